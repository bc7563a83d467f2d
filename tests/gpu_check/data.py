"""Stages `encode` and `data`: latents made, and latents read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.gpu_check.child import Check


def encode(check: Check) -> None:
    """The stage next to its VAE alone."""
    from sdtrain.demo.train_vae import build_vae
    from tests.benchmarks.encode import QUICK, Size, measure

    def write_small_vae(folder: Path) -> Path:
        build_vae().save_pretrained(folder)
        return folder

    size = Size(64, 4, 2, write_vae=write_small_vae) if check.is_small else QUICK
    check.record(**measure(check.work / "encode", size))


def load(check: Check) -> None:
    """Batches as training gets them, next to the images a second that it took."""
    from tests.benchmarks.loader import SAMPLES_PER_SHARD, rate, training_batches, write_dataset

    resolutions, num_samples, num_batches = ((64, 32), 1000, 40) if check.is_small else ((512, 256), 4000, 400)
    num_workers = max(2, len(os.sched_getaffinity(0)) - 2)
    check.record(num_workers=num_workers, samples_per_shard=SAMPLES_PER_SHARD)
    for resolution in resolutions:
        dataset = write_dataset(check.work / f"load-{resolution}", num_samples, resolution // 8)
        by_clock, _ = rate(training_batches(dataset, resolution, num_batches, num_workers), num_batches)
        trained = check.earlier("best").get(f"{resolution}px", {})
        check.record(**{f"{resolution}px": _next_to(by_clock, trained)})


def _next_to(by_clock: float, trained: dict[str, Any]) -> dict[str, Any]:
    rate = trained.get("images_per_s")
    return {
        "samples_per_s": round(by_clock, 1),
        "training_images_per_s": rate,
        "vs_training": round(by_clock / rate, 2) if rate else None,
        "data_wait_in_training": trained.get("data_wait"),
    }
