"""Takes a check's rates into sdtrain/plan/measured.json: python -m tests.gpu_check.rates DIR.

From then on `sdtrain plan` reckons with them for this GPU: with the training speeds, with ENCODE's rate, which it
converts to other resolutions by the number of pixels, and with SCORE's, whose networks see images of one size.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdtrain.plan.measured import Measured, MeasuredRate, MeasuredSpeed, record_measured
from sdtrain.plan.speeds import published_speeds
from tests.gpu_check.record import read_result


def measured_of(result: dict[str, Any]) -> Measured:
    """The speeds of the best settings in the whole training loop, and the other stages' rates, of those that passed.

    Nothing of a check without a GPU.
    """
    figures = {stage["name"]: stage["figures"] for stage in result["stages"]}
    name = figures.get("machine", {}).get("gpu", {}).get("name")
    if result["device"] == "cpu" or name is None:
        return Measured()
    source, origin = f"{result['command']}, {result['started'][:10]}", {"gpu": _key(name), "commit": _commit(result)}
    best = figures.get("best", {})
    speeds = (
        MeasuredSpeed(
            resolution=int(key.removesuffix("px")),
            num_gpus=1,
            micro_batch=run["micro_batch"],
            images_per_s=run["images_per_s"],
            source=f"{source}, settings {best.get('settings')}",
            **origin,
        )
        for key, run in best.items()
        if key.endswith("px")
    )
    passed = {stage["name"]: stage["figures"] for stage in result["stages"] if stage["status"] == "passed"}
    rates = (MeasuredRate(**rate, source=f"{source}, {words}", **origin) for rate, words in _rates(passed))
    return Measured(training=tuple(speeds), rates=tuple(rates))


def _rates(figures: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """The stages' rates, and the conditions in words."""
    if found := figures.get("encode"):
        rate = {"name": "encode_images", "value": found["images_per_s"], "resolution": found["resolution"]}
        yield rate, f"{found['precision']}, {found['resolution']} px"
    if found := figures.get("score"):
        decoder = "gpu" if "gpu_decoding_images_per_s" in found else "cpu"  # as score.decode: auto does
        rate = {"name": "score_images", "value": found[f"{decoder}_decoding_images_per_s"]}
        yield rate, f"{found['model']}, {found['dtype']}, decoded by the {decoder.upper()}"


def _commit(result: dict[str, Any]) -> str:
    return result.get("commit") or ""


def _key(name: str) -> str:
    """The name by which `sdtrain plan --gpu` knows a GPU; of another one the driver's, as one word."""
    words = name.lower().replace("-", " ").split()
    known = [gpu for gpu in published_speeds() if gpu in words]
    return known[0] if known else "-".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_check.rates", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="--out of the check")
    folder = parser.parse_args().folder
    found = measured_of(result) if (result := read_result(folder)) else Measured()
    if not found.training and not found.rates:
        raise SystemExit(f"{folder} holds no rate of a GPU: python -m tests.gpu_check --out {folder}")
    record_measured(found)
    for speed in found.training:
        print(f"{speed.gpu} {speed.resolution} px, micro-batch {speed.micro_batch}: {speed.images_per_s:g} images/s")
    for rate in found.rates:
        print(f"{rate.gpu} {rate.name}: {rate.value:g} a second ({rate.source})")


if __name__ == "__main__":
    main()
