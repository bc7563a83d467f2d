"""Threads that decode images ahead of the networks.

`python -m tests.benchmarks.score --preprocessing` measures their work, part by part. Pillow, OpenCV, scipy and hashlib
release the GIL for most of it; when Pillow did the resampling, one process peaked at five or six threads, 700 images a
second. A faster GPU needs several processes (`sdtrain.models.device` spreads them) or decodes itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from filters.score.jpeg_decoder import Fallbacks, JpegDecoder
from filters.score.models import Models, score_batch
from filters.score.preprocess import PreprocessedImage, Sample, preprocess, read_shard
from sdtrain.dataset.layout import DatasetDir
from sdtrain.images.prefetch import prefetch

# Batches to read and decode ahead of the networks; two even out slow ones.
_DEPTH = 2
Pending = Callable[[], list[PreprocessedImage]]


@dataclass(frozen=True)
class _Batch:
    """Some images of one shard; batches never span shards, so that scores do not depend on what else is scored."""

    shard: int
    images: Pending
    ends_shard: bool


def score_rows(
    dataset: DatasetDir, shards: Sequence[int], models: Models, batch_size: int, on_gpu: bool
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yields (shard, rows) in order, reading and decoding the next shard in the meantime.

    Needs finished downloads. `batch_size` is the networks'; `on_gpu`: the networks' GPU decodes JPEGs. UserError for a
    damaged shard, after those before it.
    """
    rows: list[dict[str, Any]] = []
    waiting = None
    with _preprocessing(models, on_gpu) as begin, closing(_batches(dataset, shards, batch_size, begin)) as batches:
        for batch in batches:
            scored = score_batch(batch.images(), models)
            # The previous batch's scores, while a GPU is busy with this one.
            rows += waiting.rows() if waiting else []
            waiting = scored
            if batch.ends_shard:
                yield batch.shard, rows + waiting.rows()
                rows, waiting = [], None


def _batches(
    dataset: DatasetDir, shards: Sequence[int], size: int, begin: Callable[[list[Sample]], Pending]
) -> Generator[_Batch, None, None]:
    def made() -> Iterator[_Batch]:
        for shard in shards:
            samples = read_shard(dataset, shard)
            following = list(islice(samples, size))
            ends = False  # not before the first batch, which even an empty shard has
            while not ends:
                part, following = following, list(islice(samples, size))
                ends = not following
                yield _Batch(shard, begin(part), ends)

    return prefetch(made(), _DEPTH)


@contextmanager
def _preprocessing(models: Models, on_gpu: bool) -> Iterator[Callable[[list[Sample]], Pending]]:
    pool, decoding = ThreadPoolExecutor(num_threads()), ThreadPoolExecutor(1)
    decoder = JpegDecoder(models.device, Fallbacks())

    def by_cpu(samples: list[Sample]) -> Pending:
        futures = [pool.submit(preprocess, sample, models.required_views) for sample in samples]
        return lambda: [future.result() for future in futures]

    def by_gpu(samples: list[Sample]) -> Pending:
        from filters.score.gpu_decode import preprocess_on_device

        return decoding.submit(preprocess_on_device, samples, models.required_views, decoder, pool).result

    try:
        yield by_gpu if on_gpu else by_cpu
    finally:
        decoding.shutdown(cancel_futures=True)
        pool.shutdown(cancel_futures=True)
        decoder.fallbacks.report()


def num_threads() -> int:
    """Returns the number of decoding threads: this process's share of the cores if each GPU has a process."""
    cores = len(os.sched_getaffinity(0))
    return max(2, cores // max(1, torch.cuda.device_count()))
