"""The whole sweep of a tiny model, and the numbers of as many images as evaluations have.

    python -m tests.benchmarks.evaluate [--num-prompts 100] [--num-features 5000]

The first part draws and measures the images of a tiny UNet of random weights, 64 px, 20 steps, at five guidance scales
with the demo's networks, from nothing to results.json; `finish_cpu_s` is the processor time from the last image's
features to numbers and plot. The second part computes each number of that many drawn images and as many
real ones from random features as wide as Inception's, once, by processor time; its `peak_rss_mb` is that of this
process after it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from sdtrain.evaluation.features.metrics import OverlapMetric
from sdtrain.evaluation.metrics import ImageArrays, open_metrics
from sdtrain.evaluation.protocol import Protocol
from sdtrain.evaluation.sweep import plan
from sdtrain.evaluation.workers import run_sweep
from tests.sdtrain.evaluation.evaluation_fixtures import PROMPTS, write_images
from tests.training_fixtures import write_run

SCALES = (1.0, 2.0, 3.0, 5.0, 8.0)
NUM_REAL, NUM_STEPS, NUM_FEATURES = 500, 20, 2048


def protocol(folder: Path, num_prompts: int) -> Protocol:
    """The settings, with prompts and real images in `folder`."""
    (folder / "prompts.txt").write_text("".join(f"{PROMPTS[n % len(PROMPTS)]}\n" for n in range(num_prompts)))
    settings = {"num_prompts": num_prompts, "scales": SCALES, "num_steps": NUM_STEPS, "dtype": "fp32"}
    reference = str(write_images(folder / "real", NUM_REAL))
    networks = {"networks": ("demo",), "agreement": "demo"}
    return Protocol(prompts=str(folder / "prompts.txt"), reference=reference, **settings, **networks)


def sweep_figures(folder: Path, num_prompts: int) -> dict[str, float]:
    """Seconds of the sweep, by the clock and of the processor, and those of its numbers alone."""
    os.environ["SDTRAIN_CACHE"] = str(folder / "cache")
    settings, run = protocol(folder, num_prompts), write_run(folder / "models", ema_offset=0.02)
    started, spent = time.perf_counter(), time.process_time()
    sweep = plan(settings, [run], folder / "out")
    run_sweep(sweep, say=lambda line: None)
    seconds, cpu_s, begun = time.perf_counter() - started, time.process_time() - spent, time.process_time()
    sweep.finish()
    num_images = num_prompts * len(SCALES)
    figures = {"seconds": seconds, "images_per_s": num_images / seconds, "cpu_s": cpu_s}
    figures |= {"images_per_cpu_s": num_images / cpu_s, "finish_cpu_s": time.process_time() - begun}
    return {name: round(value, 2) for name, value in figures.items()}


def number_figures(num: int) -> dict[str, float]:
    """Seconds of each number: `real` for all that is computed once, the rest for one model at one scale."""
    rng = np.random.default_rng(0)
    real, drawn = (rng.normal(shift, 1, (num, NUM_FEATURES)).astype(np.float32) for shift in (0, 0.05))
    settings = Protocol(prompts="-", reference="-", num_prompts=num, agreement="none")
    metrics = open_metrics(settings, ImageArrays({"inception": real}))
    started, seconds = time.process_time(), {}
    of_real = next(metric.of for metric in metrics if isinstance(metric, OverlapMetric))
    assert of_real.neighbours  # found now
    seconds["real"] = time.process_time() - started
    for metric in metrics:
        started = time.process_time()
        metric.measure({"features": drawn}, {})
        seconds[metric.name] = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {f"{name}_s": round(value, 1) for name, value in seconds.items()} | {"peak_rss_mb": round(peak)}


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--num-features", type=int, default=5000, help="0 leaves the second part out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = sweep_figures(Path(folder), arguments.num_prompts)
    if arguments.num_features:
        figures |= number_figures(arguments.num_features)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
