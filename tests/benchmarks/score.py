"""Scoring of 512-px JPEG shards: ours beside a plain open_clip loop and beside the networks alone, in one run.

    python -m tests.benchmarks.score [--quick | --preprocessing]

All three use the same networks (CLIP's two towers, aesthetic and safety heads, the watermark detector), precision and
batch size. The plain loop is what one writes first: Pillow, open_clip's own preprocessing, a batch, the networks, the
next batch. The networks alone see one batch that is on the device already, again and again: nothing can be faster.
Ours also hashes and measures every image and writes the table. Weights are random: they take as long as real ones.

On an NVIDIA GPU the model is ViT-L/14 in bf16, and the GPU decodes too. Else it is ViT-B/32 in float32 with a small
watermark detector; they share the cores with the decoders, so that ours cannot be as fast as the networks alone: its
best is 1 / (1 / networks + 1 / (decode rate a core x cores)), which is printed.

First of all it prints what an image costs before any network sees it, part by part (`preprocessing`); with
`--preprocessing` nothing else.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import open_clip
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from filters.recipe import Recipe, ScoreConfig
from filters.score.models import Models, load_models, score_batch
from filters.score.pipeline import num_threads
from filters.score.preprocess import WATERMARK_MEAN, WATERMARK_PX, WATERMARK_STD, Sample, preprocess, read_shard
from filters.score.stage import SCORE
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.stage import run_batch
from tests.benchmarks.photos import draw_photo
from tests.benchmarks.preprocessing import SIZE_PX, TARGET_MS, preprocessing_ms, show
from tests.image_fixtures import Fetched, write_downloads

SIDE_PX, QUALITY, NUM_DRAWN, NUM_SMALL = 512, 95, 64, 12
TURNS, QUICK_TURNS = 3, 2
CUDA = torch.cuda.is_available()


def make_shards(folder: Path, num_images: int, per_shard: int) -> DatasetDir:
    """Downloaded shards of photo-like images; drawn ones come again and again, which no decoder can know."""
    with ProcessPoolExecutor() as processes:
        contents = list(processes.map(_image, range(min(NUM_DRAWN, num_images)), chunksize=4))
    print(f"{num_images:,} images of {SIDE_PX} px, {statistics.mean(map(len, contents)) / 1e3:.0f} kB on average")
    captions = [f"photo number {i} of a house by the sea, summer {i % 90}" for i in range(num_images)]
    rows = [Fetched(contents[i % len(contents)], caption=caption) for i, caption in enumerate(captions)]
    return write_downloads(folder, rows, per_shard)


def _image(seed: int, size_px: tuple[int, int] = (SIDE_PX, SIDE_PX)) -> bytes:
    photo = Image.open(io.BytesIO(draw_photo(seed)))
    buffer = io.BytesIO()
    ImageOps.fit(photo, size_px).save(buffer, "jpeg", quality=QUALITY)
    return buffer.getvalue()


def measure_preprocessing() -> dict[str, dict[str, float] | float]:
    """Milliseconds of one core, by part, and the target for the total."""
    found = preprocessing_ms([_image(seed, SIZE_PX) for seed in range(NUM_SMALL)])
    show(found)
    return {"preprocessing_ms": found, "target_ms": TARGET_MS}


def settings(quick: bool) -> tuple[ScoreConfig, int, int]:
    """What is scored by which networks: configuration, images, shards."""
    if CUDA:
        heads = {"aesthetic_weights": "random:0", "safety_weights": "random:0", "watermark_weights": "random-full:0"}
        config = ScoreConfig(clip_weights="random:0", **heads, batch_size=256, dtype="bf16", decode="auto")
        return config, 4_096 if quick else 32_768, 4
    # ViT-B/32 has smaller embeddings than the heads judge; they take no time beside it.
    heads = {"aesthetic_weights": None, "safety_weights": None, "watermark_weights": "random:0"}
    return ScoreConfig(clip_model="ViT-B-32", clip_weights="random:0", **heads, batch_size=16), 48 if quick else 192, 2


def run_ours(dataset: DatasetDir, config: ScoreConfig, shards: list[int]) -> None:
    reports = run_batch(SCORE, dataset, Recipe(name="benchmark", score=config), shards)
    assert all(report.num_out == report.num_in for report in reports)


def run_plain(dataset: DatasetDir, config: ScoreConfig, models: Models, shards: list[int]) -> None:
    """Pillow and open_clip, batch by batch; the scores come to the CPU, as anyone's would."""
    assert models.preprocess is not None
    clip_transform = open_clip.image_transform(models.preprocess.size_px, is_train=False)
    normalise = v2.Normalize(WATERMARK_MEAN, WATERMARK_STD)
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalise])
    for shard in shards:
        samples = read_shard(dataset, shard)
        while batch := list(islice(samples, config.batch_size)):
            images = [Image.open(io.BytesIO(sample.image)).convert("RGB") for sample in batch]
            clip = torch.stack([clip_transform(image) for image in images]).to(models.device)
            squashed = [image.resize((WATERMARK_PX, WATERMARK_PX)) for image in images]
            watermark = torch.stack([to_tensor(image) for image in squashed]).to(models.device)
            tokens = models.tokenizer([sample.members["txt"].decode() for sample in batch]).to(models.device)
            for scores in _forward(models, clip, watermark, tokens):
                scores.cpu()


def run_networks(models: Models, batch_size: int, num_images: int) -> None:
    """The networks on one batch in the device's memory, until they have seen as many images."""
    assert models.preprocess is not None
    side = models.preprocess.size_px
    clip, watermark = (torch.randn(batch_size, 3, px, px, device=models.device) for px in (side, WATERMARK_PX))
    tokens = models.tokenizer(["photo of a house by the sea"] * batch_size).to(models.device)
    for _ in range(num_images // batch_size):
        scores = _forward(models, clip, watermark, tokens)
    scores[0].cpu()


def _forward(models: Models, clip: torch.Tensor, watermark: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
    enabled = models.dtype != torch.float32
    autocast = torch.autocast(models.device.type, models.dtype if enabled else torch.bfloat16, enabled=enabled)
    assert models.clip is not None
    assert models.watermark is not None
    with torch.inference_mode(), autocast:
        images = models.clip.encode_image(clip, normalize=True).float()
        texts = models.clip.encode_text(tokens, normalize=True).float()
        heads = [head(images) for _, head in models.heads]
        return [(images * texts).sum(-1), models.watermark(watermark), *heads]


def decode_rate(dataset: DatasetDir, models: Models) -> float:
    """Images that one thread preprocesses in a second: decode, views, hashes, measures."""
    samples: list[Sample] = list(islice(read_shard(dataset, 0), NUM_DRAWN))
    seconds = min(
        _timed(lambda: [preprocess(sample, models.required_views) for sample in samples]) for _ in range(TURNS)
    )
    return len(samples) / seconds


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(folder: Path, quick: bool) -> dict[str, float]:
    """All rates, side by side, and their ratios."""
    config, num_images, num_shards = settings(quick)
    dataset, shards = make_shards(folder, num_images, num_images // num_shards), list(range(num_shards))
    models = load_models(config)
    print(
        f"{config.clip_model}, {config.dtype}, batches of {config.batch_size} on {models.device}; decode: "
        f"{config.decode}, {num_threads()} threads of {os.cpu_count()} cores; torch: {torch.get_num_threads()} threads"
    )
    contenders = {
        "networks": lambda: run_networks(models, config.batch_size, num_images),
        "ours": lambda: run_ours(dataset, config, shards),
        "plain": lambda: run_plain(dataset, config, models, shards),
    }
    score_batch(
        [preprocess(sample, models.required_views) for sample in islice(read_shard(dataset, 0), config.batch_size)],
        models,
    ).rows()
    # In turns, because a machine is not always equally fast; ratios are of what stood side by side.
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(QUICK_TURNS if quick else TURNS):
        for name, work in contenders.items():
            seconds[name].append(_timed(work))
            print(f"{name:9} {num_images / seconds[name][-1]:8.1f} images/s", flush=True)
    decoded = decode_rate(dataset, models)
    if not CUDA:
        shared = min(seconds["networks"]) / num_images + 1 / (decoded * num_threads())
        print(f"the best that networks and decoders can do on the same cores: {1 / shared:.1f} images/s")
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds["ours"], strict=True))
        for name in ("networks", "plain")
    }
    return {
        "vs_model_rate": round(ratios["networks"], 3),
        "vs_plain_loop": round(ratios["plain"], 2),
        "images_per_s": round(num_images / min(seconds["ours"]), 1),
        "decode_per_s_per_core": round(decoded, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a quarter or less of the images")
    parser.add_argument("--preprocessing", action="store_true", help="only what an image costs before the networks")
    arguments = parser.parse_args()
    found: dict[str, object] = dict(measure_preprocessing())
    if not arguments.preprocessing:
        with tempfile.TemporaryDirectory() as folder:
            found |= measure(Path(folder), arguments.quick)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
