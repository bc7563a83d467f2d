"""Training throughput: our loop beside diffusers' example, on the same random latents, in one run.

    python -m tests.benchmarks.train [--config NAME|FILE|mid] [--resolution PX] [--quick] [--ladder]

On CUDA the network is SD v1's, else the tiny one and one of 50 million parameters. Latents are cached, text is encoded
in the loop, the average is on, a step has two micro-batches; weights are random, which takes as long. Each contender
has a process of its own, and its clock starts after a warm-up. `tflops` counts three forward passes for a step (SDPA
counted, recomputation and the text encoder not); `mfu` is its share of 989 TFLOP/s on an H100 or H200, and where the
data sheet is not known of the best matrix product measured here, which is `mfu_measured` in both cases.

--ladder starts with almost no optimization and tries one after the other (`ladder.py`), keeping those that pay.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from sdtrain.config import TrainConfig
from sdtrain.training.throughput import TRAIN_FACTOR, forward_flops, peak_flops
from tests.benchmarks.ladder import LARGEST_MICRO_BATCH, Rung, climb
from tests.benchmarks.training_loops import CUDA, DEVICE, matmul_flops, run_ours, run_stock
from tests.benchmarks.training_world import endless, settings_of, write_settings, write_world

ACCUMULATION = 2
NUM_WARM = 10 if CUDA else 2
NUM_TOKENS = 77


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """Runs one contender in a fresh process, so that neither memory nor settings of another are left over."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(work, *arguments).result()


class Bench:
    """One network on one set of latents.

    Args:
        folder: for latents, networks and runs.
        name: of the config.
        resolution: side of the images in pixels, or the config's.
        seconds: of each timed run.
    """

    def __init__(self, folder: Path, name: str, resolution: int | None, seconds: float):
        self._folder, self._seconds, self._runs = folder, seconds, 0
        self._content = write_world(folder, settings_of(name, resolution))

    def config(self) -> tuple[Path, TrainConfig]:
        """A settings file, and what it says."""
        self._runs += 1
        content = endless(self._content, NUM_WARM) | {
            "global_batch_size": ACCUMULATION * self._content["micro_batch_size"]
        }
        path = self._folder / f"run-{self._runs}.yaml"
        return path, write_settings(path, content)

    def speed_of(self, work: Callable[..., Any]) -> dict[str, float]:
        """Runs one contender and says how fast it was."""
        path, _ = self.config()
        result: dict[str, float] = alone(work, str(path), str(self._folder / f"run-{self._runs}"), self._seconds)
        print(f"{work.__name__[4:]:6} {result['images_per_s']:9.2f} images/s  {result}", flush=True)
        return result

    def compare(self, turns: int) -> dict[str, float]:
        """Ours and the example's loop in turns, as figures."""
        _, config = self.config()
        image_flops = TRAIN_FACTOR * forward_flops(config.unet, config.latent_size, NUM_TOKENS)
        print(f"{config.name}: {config.data.resolution} px, {image_flops / 1e12:.4f} TFLOP an image", flush=True)
        both = [(self.speed_of(run_ours), self.speed_of(run_stock)) for _ in range(turns)]
        ours = max((ours for ours, _ in both), key=lambda result: result["images_per_s"])
        flops, ceiling = ours["images_per_s"] * image_flops, alone(matmul_flops)
        return {
            "images_per_s": round(ours["images_per_s"], 2),
            "tflops": round(flops / 1e12, 3),
            "mfu": round(flops / (peak_flops(DEVICE) or ceiling), 3),
            "mfu_measured": round(flops / ceiling, 3),
            "ceiling_tflops": round(ceiling / 1e12, 3),
            "vs_diffusers_example": round(statistics.median(a["images_per_s"] / b["images_per_s"] for a, b in both), 2),
            "data_wait": ours["data_wait"],
        }

    def ladder(self) -> dict[str, Any]:
        """Rung after rung, each in a process of its own, with the micro-batch of the config as the largest but one."""
        _, config = self.config()
        self._content |= {"micro_batch_size": max(1, config.micro_batch_size // 4)}
        return climb(self._rung).figures()

    def _rung(self, rung: Rung) -> dict[str, float]:
        images = LARGEST_MICRO_BATCH * self._content["micro_batch_size"]
        self._runs += 1
        path = self._folder / f"run-{self._runs}.yaml"
        write_settings(path, rung.content(endless(self._content, NUM_WARM), images))
        result: dict[str, float] = alone(run_ours, str(path), str(path.with_suffix("")), self._seconds)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="default: sd-v1-3 on CUDA, else tiny and mid")
    parser.add_argument("--resolution", type=int, help="side of the images in pixels")
    parser.add_argument("--seconds", type=float, help="of each timed run (default: 60 on CUDA, else 20)")
    parser.add_argument("--quick", action="store_true", help="a quarter of the time, one turn")
    parser.add_argument("--ladder", action="store_true", help="optimizations one by one")
    chosen = parser.parse_args()
    names = [chosen.config] if chosen.config else ["sd-v1-3"] if CUDA else ["tiny", "mid"]
    seconds = chosen.seconds or (60 if CUDA else 20) / (4 if chosen.quick else 1)
    figures: dict[str, Any] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), name, chosen.resolution, seconds)
            turns = 1 if CUDA or chosen.quick else 2
            figures[name] = bench.ladder() if chosen.ladder else bench.compare(turns)
    # The last network is the largest; the others' figures stand beside it under their names.
    print(json.dumps(figures.pop(names[-1]) | figures))


if __name__ == "__main__":
    main()
