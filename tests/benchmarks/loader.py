"""The loader alone: ours beside webdataset and mosaicml-streaming, on the same samples and two cores.

    python -m tests.benchmarks.loader [--quick] [--resolution 256]

The samples are latents of random numbers in the layout of the encode stage, on local disk and read before, so that no
disk is measured. `samples_per_s` is what training gets: moments, two draws of noise, timesteps, token ids.
The ratios compare moments with captions, in batches and shuffled, without noise and tokens, which the others do not
make. Ours is shuffled over all samples; webdataset over its shards and a buffer of 1,000; streaming by its default.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sdtrain.config import TrainConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.tars import write_samples
from sdtrain.encode.shard_encoder import latent_offset
from sdtrain.formats.frozen import load_text_encoder
from sdtrain.loading.latent_store import LatentStore
from sdtrain.loading.loader import BatchMaker
from sdtrain.loading.order import BlockOrder, GlobalOrder
from sdtrain.loading.sample_plan import SamplePlan, SourcePlan

CORES, BATCH, SAMPLES_PER_SHARD = 2, 32, 1000
WORDS = ["photo", "old", "red", "boat", "quiet", "lake", "under", "grey", "clouds", "in", "autumn", "on", "the"]


@dataclass(frozen=True)
class Size:
    """How much work."""

    samples: int
    batches: int


FULL, QUICK = Size(8000, 400), Size(2000, 60)


def samples(first: int, last: int, side: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number in range(first, last):
        rng = np.random.default_rng(number)
        file = io.BytesIO()
        np.save(file, rng.standard_normal((8, side, side), np.float32).astype(np.float16))
        caption = " ".join(rng.permutation(WORDS)[:11])
        described = {"uid": f"{number:032x}", "caption": caption, "url": f"https://a.example/{number}.jpg"}
        members = {"moments.npy": file.getvalue(), "txt": caption.encode(), "json": json.dumps(described).encode()}
        yield f"{number:09d}", members


def write_dataset(root: Path, num_samples: int, side: int) -> DatasetDir:
    """Latents as the encode stage writes them."""
    dataset = DatasetDir(root)
    dataset.latents_info.parent.mkdir(parents=True)
    for shard in range(num_samples // SAMPLES_PER_SHARD):
        tar, first = dataset.latents_tar(shard), shard * SAMPLES_PER_SHARD
        index = write_samples(tar, samples(first, first + SAMPLES_PER_SHARD, side))
        rows = [
            json.loads(members["json"])
            | {"key": key, "num_bytes": 16 * side * side, "height": side, "width": side}
            | latent_offset(tar, place)
            for (key, members), place in zip(samples(first, first + SAMPLES_PER_SHARD, side), index, strict=True)
        ]
        pq.write_table(pa.Table.from_pylist(rows), dataset.latents_table(shard), compression="zstd")
    dataset.latents_info.write_text(json.dumps({"resolution": 8 * side}))
    return dataset


def rate(batches: Iterable[Any], num_batches: int) -> tuple[float, float]:
    """Samples a second by the clock, and by the processor time of this process; the first batches do not count."""
    taken, warm = iter(batches), num_batches // 8
    for _ in range(warm):
        next(taken)
    started, spent = time.perf_counter(), time.process_time()
    for _ in range(num_batches - warm):
        next(taken)
    count = BATCH * (num_batches - warm)
    return count / (time.perf_counter() - started), count / (time.process_time() - spent)


def training_batches(dataset: DatasetDir, resolution: int, num_batches: int, num_workers: int = CORES) -> Iterator[Any]:
    """What training gets, from `num_workers` threads."""
    config = TrainConfig(
        name="loader",
        vae="demo",
        text_encoder="demo",
        data={"root": str(dataset.root), "resolution": resolution, "num_workers": num_workers},
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        steps=num_batches,
        caption_dropout=0.1,
    )
    tokenizer, _ = load_text_encoder("demo")
    return BatchMaker(LatentStore(dataset.root, resolution), tokenizer, config, 0, 1).prefetch(0, num_batches, False)


def moments_and_captions(dataset: DatasetDir, resolution: int, num_batches: int) -> Iterator[Any]:
    """What the others give, from ours."""
    store = LatentStore(dataset.root, resolution)
    plan = SamplePlan([SourcePlan((GlobalOrder(len(store), 1),))], BATCH)

    def make(step: int) -> tuple[torch.Tensor, list[str]]:
        picks, rows = plan.batch(step), store.buffer(BATCH, 0)
        fetched = store.fetch(picks.indices, picks.epochs, 1, rows)
        return torch.from_numpy(rows), fetched.captions

    with ThreadPoolExecutor(CORES) as pool:
        ahead = deque(pool.submit(make, step) for step in range(4))
        for step in range(4, num_batches + 4):
            yield ahead.popleft().result()
            ahead.append(pool.submit(make, step))


def webdataset_batches(dataset: DatasetDir) -> Iterator[Any]:
    """The same tars in webdataset, with one worker process a core."""
    import webdataset as wds

    tars = sorted(str(path) for path in dataset.latents_info.parent.glob("*.tar"))
    stream = (
        wds.WebDataset(tars, shardshuffle=len(tars), seed=1)
        .repeat()
        .shuffle(1000)
        .to_tuple("moments.npy", "txt")
        .map_tuple(lambda body: np.load(io.BytesIO(body)), bytes.decode)
        .batched(BATCH)
    )
    return iter(wds.WebLoader(stream, batch_size=None, num_workers=CORES))


def streaming_batches(dataset: DatasetDir, folder: Path, num_samples: int, side: int) -> Iterator[Any]:
    """The same samples in mosaicml-streaming's own format, with one worker process a core."""
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder), columns={"moments": "ndarray:float16", "caption": "str"}) as writer:
        for _, members in samples(0, num_samples, side):
            moments = np.load(io.BytesIO(members["moments.npy"]))
            writer.write({"moments": moments, "caption": members["txt"].decode()})
    stream = StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    loader = torch.utils.data.DataLoader(stream, batch_size=BATCH, num_workers=CORES)
    while True:
        yield from loader


def seek_s() -> float:
    """The longest first look at a far step in an epoch of 10^9 samples, in both shuffles."""
    orders = (GlobalOrder(10**9, 1), BlockOrder(np.full(100_000, 10_000), 64, 1))
    longest = 0.0
    for order in orders:
        started = time.perf_counter()
        SamplePlan([SourcePlan((order,))], 2048).batch(236_999)
        longest = max(longest, time.perf_counter() - started)
    return longest


def measure(folder: Path, size: Size, resolution: int) -> dict[str, float | None]:
    side = resolution // 8
    dataset = write_dataset(folder / "data", size.samples, side)
    ours, per_core = rate(training_batches(dataset, resolution, size.batches), size.batches)
    print(f"as training needs them: {ours:.0f} samples/s ({per_core:.0f} a second of processor time)", flush=True)
    plain, per_core = rate(moments_and_captions(dataset, resolution, size.batches), size.batches)
    print(f"moments and captions: {plain:.0f} samples/s ({per_core:.0f} a second of processor time)", flush=True)
    others: dict[str, float | None] = {"webdataset": rate(webdataset_batches(dataset), size.batches)[0]}
    print(f"webdataset: {others['webdataset']:.0f} samples/s", flush=True)
    try:
        streamed = streaming_batches(dataset, folder / "mds", size.samples, side)
        others["streaming"] = rate(streamed, size.batches)[0]
        print(f"streaming: {others['streaming']:.0f} samples/s", flush=True)
    except ImportError as error:
        others["streaming"] = None
        print(f"mosaicml-streaming is not installed ({error}): uv pip install --group bench", file=sys.stderr)
    ratios = {f"vs_{name}": round(plain / other, 2) if other else None for name, other in others.items()}
    return {"samples_per_s": round(ours), **ratios, "seek_s": round(seek_s(), 5)}


def main() -> None:
    """Prints one line of JSON after a line for each loader."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--resolution", type=int, default=512)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), QUICK if arguments.quick else FULL, arguments.resolution)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
