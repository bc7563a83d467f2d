"""Search for copies: how many planted ones are found, and how its time grows from 1 to 10 million images.

    python -m tests.benchmarks.duplicates [--quick]
    python -m tests.benchmarks.duplicates --generated 100_000_000 [--limit-s 1500] [--level altered|copied]

Speed: a fifth of the images are copies of random others: hashes with 0 to 4 bits flipped, colours a little off, and
a quarter of these with equal pixels. Time is that of reading Parquet, all levels up to perceptual, and writing the
groups; each size is a process of its own, so that its peak memory is its own. The hashes are uniform; those of real
images share bits more often, which costs longer keys. For the level `altered` a third of the copies are mirrored, and
miniatures are noise. For `copied` that third have other hashes and colours, and embeddings whose cosine with their
original's is 0.75 to 0.95; they are random, with no clusters to help, and `recall` is the share of that third that is
found. Quality: copies of images, one table row a change and level; `recall` is over all six changes,
`recall_promised` over resized and recompressed ones for `perceptual`, and cropped, watermarked and mirrored ones too
for `altered`. Hard negatives are different images that look alike; all that are grouped are errors.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from filters.dedup.columns import COLOR_BYTES, Images
from filters.dedup.levels import group_images
from filters.recipe import DuplicatesConfig
from sdtrain.dataset.progress import Step, progress_listener, throttled
from sdtrain.images.miniature import MINIATURE_BYTES, planes_of
from tests.benchmarks.duplicate_quality import CONFIG, measure_quality

SIZES, QUICK_SIZES = (1_000_000, 10_000_000), (100_000, 1_000_000)
ROWS_PER_FILE = 1_000_000
ONE_IN = 5  # is a copy
_COLUMNS = frozenset({"uid", "pixel_sha256", "sha256", "phash", "thumbnail"})
_NUM_NOISES = 4096
_GENERATED_AT_ONCE = 100_000
_EMBEDDING_SIZE, _SUMMED, _COSINES = 512, 6, (0.75, 0.95)


def make_images(folder: Path, num: int) -> None:
    """What SCORE would know of `num` images, in Parquet."""
    for start in range(0, num, ROWS_PER_FILE):
        pq.write_table(
            _images(np.arange(start, min(start + ROWS_PER_FILE, num), dtype=np.uint64), num), _part(folder, start)
        )


def _images(numbers: np.ndarray, num: int, wanted: frozenset[str] = _COLUMNS, altered: bool = False) -> pa.Table:
    """The wanted columns of some images; a digest takes as long as all others together.

    With `altered`, a third of the copies that are not exact are mirrored, and have other hashes.
    """
    copies = numbers % ONE_IN == ONE_IN - 1
    # Of an image anywhere that is none itself.
    original = np.where(copies, _random(numbers, 9) % np.uint64(num // ONE_IN) * np.uint64(ONE_IN), numbers)
    exact = copies & (_random(numbers, 10) % 4 == 0)
    mirrored = altered & _differ(numbers)
    looks = np.where(mirrored, numbers, original)  # another hash and other colours than the original's
    hashes = _random(looks, 0)
    for flip in range(CONFIG.radius):
        bit = np.uint64(1) << (_random(numbers, 20 + flip) % np.uint64(64))
        hashes = np.where(copies & ~exact & (_random(numbers, 30 + flip) % 2 == 0), hashes ^ bit, hashes)
    colors = np.stack([_random(looks, 40 + i) for i in range(COLOR_BYTES // 8)], axis=1).view(np.uint8) & 127
    colors += np.where(copies & ~exact, numbers % 7, 0).astype(np.uint8)[:, None]
    same = np.where(exact, original, numbers)
    columns = {
        "uid": lambda: _hex(numbers, 2, 50),
        "pixel_sha256": lambda: _hex(same, 4, 60),
        "sha256": lambda: _hex(numbers, 4, 70),
        "phash": lambda: pa.array(hashes.view(np.int64)),
        "thumbnail": lambda: pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(COLOR_BYTES), len(numbers), [None, pa.py_buffer(np.ascontiguousarray(colors))]
        ).cast(pa.binary()),
        "miniature": lambda: _miniatures(original, mirrored),
        "sscd_embedding": lambda: _embeddings(numbers, original),
    }
    return pa.table({name: column() for name, column in columns.items() if name in wanted})


def _differ(numbers: np.ndarray) -> np.ndarray:
    """Whether an image is a copy whose hash is another than its original's."""
    is_copy = numbers % ONE_IN == ONE_IN - 1
    return is_copy & (_random(numbers, 10) % 4 != 0) & (_random(numbers, 11) % 3 == 0)


def _embeddings(numbers: np.ndarray, original: np.ndarray) -> pa.Array:
    """Unit vectors in all directions, and of copies whose hashes differ some near their original's."""
    low, high = _COSINES
    cosine = (low + (high - low) * (_random(numbers, 90) / 2**64))[:, None].astype(np.float32)
    near, found = np.flatnonzero(_differ(numbers)), _direction(numbers)
    if len(near):
        one, other = _direction(original[near]), found[near]
        other -= (other * one).sum(axis=1, keepdims=True) * one
        other /= np.linalg.norm(other, axis=1, keepdims=True)
        found[near] = cosine[near] * one + np.sqrt(1 - cosine[near] ** 2) * other
    return pa.FixedSizeListArray.from_arrays(pa.array(found.astype(np.float16).ravel()), _EMBEDDING_SIZE)


def _direction(numbers: np.ndarray) -> np.ndarray:
    """A random unit vector for each number, (N, 512): a sum of some of a few thousand."""
    noises = np.random.default_rng(0).standard_normal((_NUM_NOISES, _EMBEDDING_SIZE), np.float32)
    found = sum(noises[_random(numbers, 91 + i) % np.uint64(_NUM_NOISES)] for i in range(_SUMMED))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def _miniatures(numbers: np.ndarray, mirrored: np.ndarray) -> pa.Array:
    """Means of three of a few thousand noises, which are different for each number."""
    noises = np.random.default_rng(0).integers(0, 256, (_NUM_NOISES, MINIATURE_BYTES), np.uint8)
    chosen = [noises[_random(numbers, stream) % np.uint64(_NUM_NOISES)] for stream in (80, 81, 82)]
    found = (chosen[0] >> 2) + (chosen[1] >> 2) + (chosen[2] >> 2) + np.uint8(32)  # about gray
    for plane in planes_of(found):
        plane[mirrored] = plane[mirrored][..., ::-1]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(MINIATURE_BYTES), len(numbers), [None, pa.py_buffer(found)])


def _random(numbers: np.ndarray, stream: int) -> np.ndarray:
    """One of many random functions of a number."""
    mixed = (numbers + np.uint64(stream << 40)) * np.uint64(0x9E3779B97F4A7C15)
    for shift in (31, 29, 32):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(0xD6E8FEB86659FD93)
    return mixed ^ (mixed >> np.uint64(32))


def _hex(numbers: np.ndarray, num_words: int, stream: int) -> pa.Array:
    words = np.stack([_random(numbers, stream + i) for i in range(num_words)], axis=1)
    nibbles = words.view(np.uint8).reshape(len(numbers), -1)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    text = np.stack([digits[nibbles >> 4], digits[nibbles & 15]], axis=2).reshape(len(numbers), -1)
    width = text.shape[1]
    buffers = [None, pa.py_buffer(np.ascontiguousarray(text))]
    return (
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(numbers), buffers)
        .cast(pa.binary())
        .cast(pa.string())
    )


def _part(folder: Path, start: int) -> Path:
    return folder / f"{start:010d}.parquet"


def be_search(folder: Path, num: int) -> None:
    """One search in this process; its figures go to standard output."""

    def read(columns: Sequence[str]) -> Iterator[pa.Table]:
        for path in sorted(folder.glob("*.parquet")):
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(10_000, columns=list(columns)):
                    yield pa.Table.from_batches([batch])

    print(json.dumps(_search(Images(read, num), folder, CONFIG)))


def search_generated(num: int, config: DuplicatesConfig, folder: Path | None, limit_s: int) -> None:
    """One search over images that are drawn while they are read, which takes the disk only what the search writes.

    Each step's progress goes to standard error with the seconds and the memory so far; after `limit_s` the search is
    given up by a signal, and its last line says how far it came.
    """

    def read(columns: Sequence[str]) -> Iterator[pa.Table]:
        for start in range(0, num, _GENERATED_AT_ONCE):
            numbers = np.arange(start, min(start + _GENERATED_AT_ONCE, num), dtype=np.uint64)
            yield _images(numbers, num, frozenset(columns), config.level != "perceptual").select(list(columns))

    started = time.monotonic()

    def say(step: Step) -> None:
        memory_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{time.monotonic() - started:7.0f} s, at most {memory_mb:,.0f} MB: {step}", file=sys.stderr, flush=True)

    signal.alarm(limit_s)
    with tempfile.TemporaryDirectory(dir=folder) as place, progress_listener(throttled(say, 10)):
        images = Images(read, num, has_miniatures=config.level == "altered", has_sscd=config.level == "copied")
        print(json.dumps(_search(images, Path(place), config)))


def _search(images: Images, folder: Path, config: DuplicatesConfig) -> dict[str, float]:
    num = images.num
    with tempfile.TemporaryDirectory(dir=folder) as scratch, own_memory() as own:
        started, began = time.monotonic(), time.process_time()
        found = group_images(images, config, Path(scratch), folder / "groups")
        seconds, cpu_s = time.monotonic() - started, time.process_time() - began
        disk_bytes = sum(path.stat().st_size for path in Path(scratch).iterdir())
    copies = num // ONE_IN
    # Each copy adds one to the group of its original, and no two originals are alike.
    missed = copies - found.removed[config.level]
    assert found.removed[config.level] == sum(found.dropped.values()), found
    assert missed == 0 if config.level != "copied" else missed >= 0, (found, copies)
    peak_rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {"seconds": seconds, "cpu_s": cpu_s, "peak_rss_mb": peak_rss_mb, "own_mb": own[1] - own[0]}
    if config.level == "copied":
        figures["recall"] = 1 - missed / int(_differ(np.arange(num, dtype=np.uint64)).sum())
    return figures | {"disk_bytes": disk_bytes}


@contextmanager
def own_memory() -> Iterator[list[float]]:
    """Megabytes that are the process's own at the start and at their peak, mapped files and libraries aside."""
    process, ended = psutil.Process(), threading.Event()

    def now() -> float:
        memory = process.memory_info()
        return (memory.rss - memory.shared) / 1e6

    sizes = [now()] * 2

    def watch() -> None:
        while not ended.wait(0.05):
            sizes[1] = max(sizes[1], now())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield sizes
    finally:
        ended.set()
        thread.join()


def measure(num: int, folder: Path) -> dict[str, float]:
    """The figures of one search over `num` images, in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        make_images(Path(place), num)
        command = [sys.executable, "-m", "tests.benchmarks.duplicates", "--search", place, "--num", str(num)]
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(ended.stdout.splitlines()[-1])
    print(
        f"{num:12,} images {result['seconds']:8.1f} s ({result['cpu_s']:.1f} s of CPU); {result['own_mb']:.0f} MB of "
        f"memory, {result['peak_rss_mb']:.0f} MB resident with libraries and mapped files; "
        f"{result['disk_bytes'] / num:.0f} bytes an image on disk",
        flush=True,
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the images")
    parser.add_argument("--folder", type=Path, help="where the images' table goes; by default the system's")
    parser.add_argument("--search", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--num", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--generated", type=int, metavar="NUM", help="only one search, over so many drawn images")
    parser.add_argument("--limit-s", type=int, default=1500, help="when that search is given up")
    parser.add_argument(
        "--level", choices=("perceptual", "altered", "copied"), default="perceptual", help="of that search"
    )
    parser.add_argument("--quality", action="store_true", help="only the planted copies and hard negatives")
    arguments = parser.parse_args()
    if arguments.generated:
        config = DuplicatesConfig(level=arguments.level)
        search_generated(arguments.generated, config, arguments.folder, arguments.limit_s)
        return
    if arguments.search:
        be_search(arguments.search, arguments.num)
        return
    quality = measure_quality(60 if arguments.quick else 400)
    if arguments.quality:
        print(json.dumps(quality))
        return
    sizes = QUICK_SIZES if arguments.quick else SIZES
    small, large = (measure(num, arguments.folder) for num in sizes)
    figures = quality | {
        "seconds_per_million": round(large["seconds"] / sizes[1] * 1e6, 2),
        "growth_10x": round(large["seconds"] / small["seconds"], 1),
        "cpu_growth_10x": round(large["cpu_s"] / small["cpu_s"], 1),  # the same on a machine that others use too
        "own_mb": round(large["own_mb"]),
        "peak_rss_mb": round(large["peak_rss_mb"]),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
