"""Stages `profile`, `ladder` and `best`: training through the loop that users start, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from sdtrain.config import TrainConfig
from sdtrain.models.unet import build_unet
from sdtrain.training.distributed import Ranks, join
from sdtrain.training.throughput import TRAIN_FACTOR, forward_flops, peak_flops
from tests.benchmarks.ladder import FIRST, LARGEST_MICRO_BATCH, Climb, Rung, climb, free_memory
from tests.benchmarks.training_loops import CUDA, DEVICE, Clock, matmul_flops, time_training
from tests.benchmarks.training_world import endless, settings_of, write_settings, write_world
from tests.gpu_check.child import Check
from tests.gpu_check.kernels import flops_by_class, losses
from tests.gpu_check.watching import WATCHED_STATE, WatchingClock

LOG_EVERY = 3


@dataclass(frozen=True)
class Size:
    """How much a stage trains.

    Attributes:
        config: its name.
        resolution: in pixels.
        micro_batch: of the first rung of the ladder.
        seconds: timed for every figure.
    """

    config: str
    resolution: int
    micro_batch: int
    seconds: float


def _size(check: Check) -> Size:
    return Size("tiny", 64, 2, 0.5) if check.is_small else Size("sd-v1-3", 512, 8, 20.0)


def profile(check: Check) -> None:
    """Micro-batch 32, accumulation 8 and the defaults: the time, then two micro-steps by class of kernel."""
    size, accumulation = _size(check), 4 if check.is_small else 8
    content = endless(_world(check, size), LOG_EVERY)
    content["micro_batch_size"] = 4 * size.micro_batch
    content["global_batch_size"] = accumulation * content["micro_batch_size"]
    config = _written(check, content)
    clock = WatchingClock(num_warm=1, seconds=size.seconds, log_every=LOG_EVERY)
    with alone() as ranks, mock.patch(WATCHED_STATE, clock.state_class()), _built_on_device():
        measured = time_training(config, check.work / "profile", ranks, clock)
    check.record(**_rates(config, measured, check), micro_batch=config.micro_batch_size, accumulation=accumulation)
    flops = flops_by_class(config.unet, config.latent_size)
    images = clock.num_profiled * config.micro_batch_size
    flops = {name: images * value for name, value in flops.items()}
    lost = losses(clock.profile["by_class_ms"], clock.profile["idle_ms"], flops, _peak(check))
    check.record(profile=clock.profile, num_micro_steps=clock.num_profiled, lost_ms=lost, syncs=clock.syncs)
    check.record(last_micro_step_with_optimizer_step=clock.last_profile)


def climb_ladder(check: Check) -> None:
    """All rungs in this process, with the images of an optimizer step kept."""
    size = _size(check)
    content = endless(_world(check, size), log_every=10**6) | {"micro_batch_size": size.micro_batch}
    seconds = 0.1 if check.is_small else 3.0
    with alone() as ranks, _built_on_device():

        def measure(rung: Rung) -> dict[str, float]:
            config = _written(check, rung.content(content, _images(check) * size.micro_batch))
            measured = time_training(config, _new_folder(check, "ladder"), ranks, Clock(1, seconds))
            return {"images_per_s": measured["images_per_s"], "memory_gb": measured["memory_gb"]}

        def record(climbed: Climb) -> None:
            check.record(**climbed.figures())

        climbed = climb(measure, seconds_left=lambda: check.seconds_left() - 5, on_rung=record)
    record(climbed)
    check.expect(climbed.images_per_s > 0, "no rung could be measured")
    first = climbed.rungs[FIRST.name]
    check.expect("images_per_s" in first, f"the first rung, which needs least memory: {first.get('error')}")


def run_best(check: Check) -> None:
    """What paid on the ladder, at two resolutions, with data, log and average as in a real run."""
    size, best = _size(check), _best(check)
    check.record(settings=best.name)
    for resolution in (size.resolution, size.resolution // 2):
        at_size = replace(size, resolution=resolution)
        content = endless(_world(check, at_size), log_every=2)
        # A quarter of the latents: as many images in four times the batch.
        factor = 4 if resolution < size.resolution else 1
        content["micro_batch_size"] = factor * size.micro_batch
        images = _images(check) * content["micro_batch_size"]
        config = _written(check, best.content(content, images))
        with alone() as ranks, _built_on_device():
            measured = time_training(config, _new_folder(check, "best"), ranks, Clock(2, size.seconds * 0.75))
        check.record(**{f"{resolution}px": _rates(config, measured, check) | {"micro_batch": config.micro_batch_size}})
        free_memory()


def _images(check: Check) -> int:
    """Images of an optimizer step, in micro-batches of the ladder's first rung."""
    return LARGEST_MICRO_BATCH if check.is_small else 2 * LARGEST_MICRO_BATCH


def _best(check: Check) -> Rung:
    """The ladder's best, or the defaults at the size of `profile` where it was not climbed."""
    kept = check.earlier("ladder").get("best")
    if kept is None:
        return Rung(micro_batch=4)
    return Rung(kept["speed"], kept["micro_batch"], kept["gradient_checkpointing"])


def _rates(config: TrainConfig, measured: dict[str, Any], check: Check) -> dict[str, Any]:
    flops = TRAIN_FACTOR * forward_flops(config.unet, config.latent_size) * measured["images_per_s"]
    known = peak_flops(DEVICE)
    return {
        "images_per_s": round(measured["images_per_s"], 2),
        "mfu": round(flops / known, 4) if known else None,
        "of_matmul": round(flops / _matmul(check), 4),
        "memory_gb": measured["memory_gb"],
        "data_wait": measured["data_wait"],
    }


def _peak(check: Check) -> float:
    return peak_flops(DEVICE) or _matmul(check)


def _matmul(check: Check) -> float:
    """FLOP/s of the matrix product in stage `machine`, or measured now."""
    tflops = check.earlier("machine").get("matmul_tflops")
    return 1e12 * tflops if tflops else matmul_flops(0.3)


def _world(check: Check, size: Size) -> dict[str, Any]:
    """Settings with networks and latents, which are written once for all stages."""
    folder = check.work / f"world-{size.resolution}"
    content = settings_of(size.config, size.resolution)
    if check.is_small:
        content["unet"] |= {"block_out_channels": [16, 32], "num_heads": 2}
    # Previews and validation of the tiny config are no part of what is timed.
    content |= {"previews": {"every": 0}, "validation": {"num_samples": 0}}
    return write_world(folder, content)


def _written(check: Check, content: dict[str, Any]) -> TrainConfig:
    return write_settings(_new_folder(check, "settings").with_suffix(".yaml"), content)


def _new_folder(check: Check, name: str) -> Path:
    number = len(list(check.work.glob(f"{name}-*")))
    return check.work / f"{name}-{number}"


@contextmanager
def alone() -> Iterator[Ranks]:
    """This process as the only rank."""
    ranks = join(None)
    try:
        yield ranks
    finally:
        ranks.close()


def _built_on_device() -> Any:
    """The UNet's first weights drawn by the GPU, in a moment instead of ten seconds; which they are does not matter."""
    if not CUDA:
        return nullcontext()

    def build(*arguments: Any) -> Any:
        with DEVICE:
            return build_unet(*arguments)

    return mock.patch("sdtrain.training.state.build_unet", build)
