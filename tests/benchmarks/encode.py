"""Encoding of packed shards to latents: the real stage beside its VAE alone, in one run.

    python -m tests.benchmarks.encode [--quick]

The stage reads tar shards, decodes and crops JPEG images, runs the VAE and writes moments with their tables. The VAE
alone sees one batch that is on the device already, again and again: nothing can be faster. It has SD v1's size
(83,653,863 parameters) and random weights, which take as long as real ones. Images are of 512 px in fp16 on CUDA,
else of 256 in fp32. Checking latents by decoding some again is off: of a real shard's 10,000 it decodes 16. `mfu`
counts the encoder's forward pass only, as a share of 989 TFLOP/s (bf16) on an H100 or H200, and where the data sheet is
not known of the best matrix product measured here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from sdtrain.dataset.config import EncodeConfig, PackConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, write_entry
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import run_batch
from sdtrain.dataset.tars import write_samples
from sdtrain.encode.stage import ENCODE
from sdtrain.encode.vae import posterior_moments, shared_vae
from sdtrain.training.throughput import peak_flops
from tests.benchmarks.photos import draw_photo
from tests.benchmarks.training_loops import CUDA, DEVICE, matmul_flops
from tests.full_size_vae import write_full_size_vae

PRECISION: Literal["fp16", "fp32"] = "fp16" if CUDA else "fp32"  # as the card multiplies fastest
NUM_SHARDS = 2
NUM_DRAWN = 32


@dataclass(frozen=True)
class Size:
    """How much is encoded.

    Attributes:
        resolution: of the latents' images, in pixels.
        turns: of both sides.
        write_vae: writes the network into a folder.
    """

    resolution: int
    num_images: int
    batch_size: int
    turns: int = 1
    write_vae: Callable[[Path], Path] = write_full_size_vae


FULL = Size(512, 4096, 32, turns=3) if CUDA else Size(256, 8, 2, turns=3)
QUICK = Size(512, 1024, 32) if CUDA else Size(256, 4, 2)


class Recipe:
    """The part of a recipe that encoding reads."""

    def __init__(self, vae: Path, size: Size):
        self.pack = PackConfig()
        self.encode = EncodeConfig(
            vae=str(vae),
            resolution=size.resolution,
            batch_size=size.batch_size,
            precision=PRECISION,
            check_samples=0,
            min_psnr_db=0,
        )


def write_packed(root: Path, num_images: int) -> DatasetDir:
    """A packed dataset of photo-like JPEG images; drawn ones come again and again."""
    dataset, per_shard = DatasetDir(root), num_images // NUM_SHARDS
    with ProcessPoolExecutor() as processes:
        images = list(processes.map(draw_photo, range(min(NUM_DRAWN, num_images)), chunksize=4))
    for shard in range(NUM_SHARDS):
        samples = []
        for number in range(shard * per_shard, (shard + 1) * per_shard):
            caption = f"photo number {number}"
            provenance = {"uid": f"{number:032x}", "key": f"{number:09d}", "url": "", "caption": caption, "sha256": ""}
            members = {"jpg": images[number % len(images)], "txt": caption.encode()}
            samples.append((provenance["key"], members | {"json": json.dumps(provenance).encode()}))
        dataset.packed_tar(shard).parent.mkdir(parents=True, exist_ok=True)
        write_samples(dataset.packed_tar(shard), samples)
        report = ShardReport(stage="pack", shard=shard, num_in=per_shard, num_out=per_shard)
        outputs = describe_outputs(dataset, [dataset.packed_tar(shard)])
        write_entry(dataset, report.model_copy(update={"outputs": outputs}))
    pq.write_table(pa.table({"uid": pa.array([], pa.string())}), dataset.decisions)
    write_entry(dataset, ShardReport(stage="decide", shard=0, num_in=num_images, num_out=num_images))
    return dataset


def encoder_flops(vae: AutoencoderKL, resolution: int) -> int:
    """Floating-point operations of the encoder for one image."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        AutoencoderKL.from_config(vae.config).encode(torch.empty(1, 3, resolution, resolution))
    return int(counter.get_total_flops())


def timed(work: Callable[[], object]) -> float:
    """Seconds that the work takes, the device's part included."""
    if CUDA:
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(folder: Path, size: Size) -> dict[str, float | int | str]:
    """Rates of the stage and of its VAE."""
    dataset = write_packed(folder / "data", size.num_images)
    recipe = Recipe(size.write_vae(folder / "vae"), size)
    side = size.resolution
    vae = shared_vae(recipe.encode.vae, precision=PRECISION)
    pixels = torch.randint(0, 256, (size.batch_size, 3, side, side), dtype=torch.uint8, device=vae.device)
    posterior_moments(vae, pixels)
    contenders: dict[str, Callable[[], object]] = {
        "stage": lambda: run_batch(ENCODE, dataset, recipe, list(range(NUM_SHARDS))),
        "vae": lambda: [posterior_moments(vae, pixels) for _ in range(size.num_images // size.batch_size)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(size.turns):
        for name, work in contenders.items():
            seconds[name].append(timed(work))
            print(f"{name:6} {size.num_images / seconds[name][-1]:8.2f} images/s of {side} px", flush=True)
    rate, flops, ceiling = size.num_images / min(seconds["stage"]), encoder_flops(vae, side), matmul_flops()
    return {
        "images_per_s": round(rate, 2),
        "mfu": round(rate * flops / (peak_flops(DEVICE) or ceiling), 3),
        "mfu_measured": round(rate * flops / ceiling, 3),
        "vs_vae_alone": round(statistics.median(b / a for a, b in zip(*seconds.values(), strict=True)), 3),
        "resolution": side,
        "precision": PRECISION,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images, once")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), QUICK if quick else FULL)))


if __name__ == "__main__":
    main()
