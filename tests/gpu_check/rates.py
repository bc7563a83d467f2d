"""Takes a check's training speeds into sdtrain/plan/measured.json: python -m tests.gpu_check.rates DIR.

From then on `sdtrain plan` reckons with them for this GPU. What the check encodes and scores is of one size, and plans
are of several, so those rates stay the published ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sdtrain.plan.measured import Measured, MeasuredSpeed, record_measured
from sdtrain.plan.speeds import published_speeds
from tests.gpu_check.record import read_result


def measured_of(result: dict[str, Any]) -> Measured:
    """The speeds of the best settings in the whole training loop; none of a check without a GPU."""
    figures = {stage["name"]: stage["figures"] for stage in result["stages"]}
    name, best = figures.get("machine", {}).get("gpu", {}).get("name"), figures.get("best", {})
    if result["device"] == "cpu" or name is None:
        return Measured()
    source = f"{result['command']}, {result['started'][:10]}, settings {best.get('settings')}"
    speeds = (
        MeasuredSpeed(
            gpu=_key(name),
            resolution=int(key.removesuffix("px")),
            num_gpus=1,
            micro_batch=run["micro_batch"],
            images_per_s=run["images_per_s"],
            source=source,
            commit=result.get("commit") or "",
        )
        for key, run in best.items()
        if key.endswith("px")
    )
    return Measured(training=tuple(speeds))


def _key(name: str) -> str:
    """The name by which `sdtrain plan --gpu` knows a GPU; of another one the driver's, as one word."""
    words = name.lower().replace("-", " ").split()
    known = [gpu for gpu in published_speeds() if gpu in words]
    return known[0] if known else "-".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_check.rates", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="--out of the check")
    folder = parser.parse_args().folder
    if not (result := read_result(folder)) or not (found := measured_of(result)).training:
        raise SystemExit(f"{folder} holds no training speed of a GPU: python -m tests.gpu_check --out {folder}")
    record_measured(found)
    for speed in found.training:
        print(f"{speed.gpu} {speed.resolution} px, micro-batch {speed.micro_batch}: {speed.images_per_s:g} images/s")


if __name__ == "__main__":
    main()
