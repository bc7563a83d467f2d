"""Measures loss and speed while training, without waiting for the device in every step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TypeVar

import psutil
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

from sdtrain.config import TrainConfig, UNetConfig
from sdtrain.errors import UserError
from sdtrain.impact.gpus import peak_tflops
from sdtrain.models.unet import LATENT_CHANNELS, build_unet
from sdtrain.training.distributed import Ranks
from sdtrain.training.run_dir import LOSS_PARTS, NUM_LOSS_PARTS, RunDir

ItemT = TypeVar("ItemT")
_BAR_WIDTH = 24
TRAIN_FACTOR = 3
"""A training step costs three forward passes: one forward, two backward; recomputed activations are not counted."""


@dataclass(frozen=True)
class Measured:
    """Measurements of the steps since the last line, over all ranks.

    Attributes:
        loss: mean of the unweighted losses; NaN if there were none.
        loss_parts: the same for each tenth of the noise schedule, from the least noise to the most.
        images_per_s: images a second of all ranks together.
        mfu: model FLOP/s over the peak that the GPU's data sheet promises (dense bf16; a step is three forward passes,
            attention counted, recomputation not); None where the peak is not known.
        memory_gb: most GPU memory held by the first rank; without a GPU, the first rank's resident memory.
        data_wait: share of the time in which the first rank waited for batches.
        num_substituted: damaged samples replaced by others since the process started.
    """

    loss: float
    loss_parts: list[float]
    images_per_s: float
    mfu: float | None
    memory_gb: float
    data_wait: float
    num_substituted: int


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of the last step, and counts of skipped steps and of samples substituted on this rank."""

    lr: float
    grad_norm: float
    num_skipped: int = 0
    num_substituted: int = 0


class Progress:
    """Sums losses on the device and reads them only when a line is due."""

    def __init__(self, run_dir: RunDir, config: TrainConfig, ranks: Ranks, seconds_before: float):
        self._run_dir, self._config, self._ranks = run_dir, config, ranks
        self._seconds_before, self._started = seconds_before, time.monotonic()
        self._peak = peak_flops(ranks.device)
        self._image_flops = TRAIN_FACTOR * forward_flops(config.unet, config.latent_size) if self._peak else 0
        self._validation_loss: float | None = None
        self._new_window()

    def timed(self, batches: Iterator[ItemT]) -> Iterator[ItemT]:
        """Passes batches on and counts how long training waited for them."""
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self._wait_s += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def add(self, seen: list[tuple[torch.Tensor, torch.Tensor]], was_applied: bool) -> None:
        """Counts a step: of each micro-batch, the unweighted losses, (B,), and their timesteps, (B,).

        The losses of a step that was not applied, and may not be finite, do not count.
        """
        self._num_images += sum(len(losses) for losses, _ in seen)
        for losses, timesteps in seen if was_applied else ():
            parts = timesteps * NUM_LOSS_PARTS // self._config.diffusion.num_timesteps
            losses = losses.detach().double()
            self._sums.index_add_(0, parts, torch.stack([losses, torch.ones_like(losses)], dim=1))

    def validated(self, loss: float) -> None:
        """The newest validation loss, which the next lines show."""
        self._validation_loss = loss

    def check(self, step: int) -> float:
        """Mean loss since the last line, over all ranks; UserError if it is not finite."""
        sums, counts = self._ranks.sum(self._sums).T
        return self._finite(float(sums.sum() / counts.sum().clamp(min=1)), step)

    def line(self, step: int, metrics: StepMetrics) -> Measured:
        """Writes one line of the log, on the first rank, and begins a new window; UserError for a non-finite loss."""
        measured = self._measure(step, metrics)
        if self._ranks.is_first:
            loss, *parts = [None if math.isnan(loss) else loss for loss in (measured.loss, *measured.loss_parts)]
            self._run_dir.log.add(
                step=step,
                loss=loss,
                lr=metrics.lr,
                grad_norm=metrics.grad_norm,
                num_skipped=metrics.num_skipped,
                num_substituted=measured.num_substituted,
                images_per_s=round(measured.images_per_s, 2),
                seconds=round(self._seconds_before + time.monotonic() - self._started, 3),
                data_wait=round(measured.data_wait, 4),
                mfu=None if measured.mfu is None else round(measured.mfu, 4),
                memory_gb=round(measured.memory_gb, 3),
                **dict(zip(LOSS_PARTS, parts, strict=True)),
            )
            print(self._text(step, measured, metrics), flush=True)
        self._new_window()
        return measured

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block out of the speed."""
        began = time.monotonic()
        yield
        self._window_started += time.monotonic() - began

    def _measure(self, step: int, metrics: StepMetrics) -> Measured:
        window_s = max(time.monotonic() - self._window_started, 1e-9)
        sums, counts = self._ranks.sum(self._sums).T
        images_per_s = self._num_images * self._ranks.world_size / window_s
        flops = images_per_s * self._image_flops / self._ranks.world_size
        return Measured(
            loss=self._finite(float(sums.sum() / counts.sum()), step) if counts.any() else math.nan,
            loss_parts=(sums / counts).tolist(),
            images_per_s=images_per_s,
            mfu=flops / self._peak if self._peak else None,
            memory_gb=_memory_bytes(self._ranks.device) / 1e9,
            data_wait=self._wait_s / window_s,
            num_substituted=int(self._ranks.sum(torch.tensor([metrics.num_substituted]))),
        )

    def _finite(self, loss: float, step: int) -> float:
        if not math.isfinite(loss):
            raise UserError(
                f"The loss is {loss} before step {step}. Training stopped; the last checkpoint is from before. Lower "
                "optimizer.lr, set optimizer.max_grad_norm to 1, or look for damaged latents."
            )
        return loss

    def _text(self, step: int, measured: Measured, metrics: StepMetrics) -> str:
        steps = self._config.steps
        left_s = (steps - step) * self._config.global_batch_size / max(measured.images_per_s, 1e-9)
        shown = [
            f"{_bar(step / steps)} {step / steps:>4.0%}",
            f"step {step}/{steps}",
            "no step applied" if math.isnan(measured.loss) else f"loss {measured.loss:.4f}",
            f"val {self._validation_loss:.4f}" if self._validation_loss is not None else "",
            f"grad {metrics.grad_norm:.3g}",
            f"lr {metrics.lr:.1e}",
            f"{measured.images_per_s:,.0f} img/s",
            f"MFU {measured.mfu:.1%}" if measured.mfu is not None else "",
            f"wait {measured.data_wait:.1%}",
            f"{measured.memory_gb:.1f} GB",
            f"{metrics.num_skipped} steps skipped" if metrics.num_skipped else "",
            f"{measured.num_substituted} samples substituted" if measured.num_substituted else "",
            f"{timedelta(seconds=round(left_s))} left",
        ]
        return "  ".join(part for part in shown if part)

    def _new_window(self) -> None:
        self._window_started, self._wait_s, self._num_images = time.monotonic(), 0.0, 0
        # By tenth of the schedule: sum of the losses, and their number.
        self._sums = torch.zeros(NUM_LOSS_PARTS, 2, dtype=torch.float64, device=self._ranks.device)


def _bar(share: float) -> str:
    full = round(share * _BAR_WIDTH)
    return "━" * full + "─" * (_BAR_WIDTH - full)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return int(psutil.Process().memory_info().rss)


def forward_flops(config: UNetConfig, latent_size: int, num_tokens: int = 77) -> int:
    """Floating-point operations of one forward pass of the UNet per image, including attention's matrix products.

    A multiply-add counts as two. SD v1 at 64x64 latents: 803.3 GFLOP.
    """
    return _forward_flops(config.model_dump_json(), latent_size, num_tokens)


@lru_cache(maxsize=4)
def _forward_flops(config_json: str, latent_size: int, num_tokens: int) -> int:
    config = UNetConfig.model_validate_json(config_json)
    with torch.device("meta"), torch.no_grad():
        unet = build_unet(config, latent_size).eval()
        unet.set_attn_processor(AttnProcessor())  # plain matrix products, which the counter knows on every device
        latents = torch.empty(1, LATENT_CHANNELS, latent_size, latent_size)
        context = torch.empty(1, num_tokens, config.cross_attention_dim)
        with FlopCounterMode(display=False) as counter:
            unet(latents, torch.zeros(1, dtype=torch.int64), context)
    return counter.get_total_flops()


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s that the GPU's data sheet promises; None for CPUs and GPUs that are not in the table."""
    if device.type != "cuda":
        return None
    tflops = peak_tflops(torch.cuda.get_device_name(device))
    return None if tflops is None else 1e12 * tflops
