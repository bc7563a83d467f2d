"""Asks a server the same questions about every image of a downloaded shard."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pyarrow.parquet as pq

from sdtrain.dataset.files import read_parquet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.sync import fetch_shard_file
from sdtrain.dataset.tars import read_samples
from sdtrain.endpoint.answer_log import AnswerLog
from sdtrain.endpoint.answers import Answer
from sdtrain.endpoint.ask import ask
from sdtrain.endpoint.budget import Budget
from sdtrain.endpoint.config import EndpointConfig
from sdtrain.endpoint.messages import Request, jpeg_of
from sdtrain.images.decode import decode_rgb, image_extension

T = TypeVar("T")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Questions:
    """The same questions about every image.

    Attributes:
        texts: name -> question.
        max_tokens: of an answer.
        image_px: longest side of the images that are sent.
        top_logprobs: as of `Request`.
    """

    texts: Mapping[str, str]
    max_tokens: int
    image_px: int
    top_logprobs: int = 0


def ask_about_images(
    dataset: DatasetDir,
    shard: int,
    uids: Mapping[str, str],
    questions: Questions,
    config: EndpointConfig,
    setting: str,
    log: AnswerLog,
) -> None:
    """Asks what `log` lacks about the images of a shard, `uids` by key, and keeps each answer there as it comes.

    What it costs counts for the dataset's budget. EndpointError as `ask` raises it.
    """
    missing = {key: [name for name in questions.texts if (uid, name) not in log] for key, uid in uids.items()}
    asked: list[tuple[str, str]] = []

    def encoded(image: tuple[str, bytes]) -> tuple[str, bytes]:
        return image[0], jpeg_of(decode_rgb(image[1]), questions.image_px)

    def requests() -> Iterator[Request]:
        wanted = {key for key, names in missing.items() if names}
        for key, jpeg in in_threads(encoded, shard_images(dataset, shard, wanted)):
            for name in missing[key]:
                asked.append((uids[key], name))
                yield Request(questions.texts[name], (jpeg,), questions.max_tokens, questions.top_logprobs)

    def keep(number: int, answer: Answer) -> None:
        log.add(*asked[number], answer)

    if any(missing.values()):
        ask(config, requests(), setting, Budget(config, dataset.spent), keep)


def pixels_of(dataset: DatasetDir, shard: int) -> dict[str, int | None]:
    """Of the images of a shard that SCORE could decode, by uid: the first 64 bits of their pixels' sha256."""
    wanted = {"uid", "reason", "pixel_sha256"}  # the oldest datasets have no digests
    known = [name for name in pq.read_schema(dataset.scores(shard)).names if name in wanted]
    rows = read_parquet(dataset.scores(shard), known).to_pylist()
    digests = {row["uid"]: row.get("pixel_sha256") for row in rows if row["reason"] is None}
    return {uid: int(digest[:16], 16) if digest else None for uid, digest in digests.items()}


def shard_images(dataset: DatasetDir, shard: int, keys: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Yields key and file of a shard's images, in the tar's order."""
    if not keys:
        return
    tar = dataset.images_tar(shard)
    fetch_shard_file(dataset.root, tar, "download")
    for key, members in read_samples(tar):
        if key in keys:
            yield key, members[image_extension(members)]


def in_threads(work: Callable[[T], ResultT], items: Iterable[T]) -> Iterator[ResultT]:
    """Yields `work` of each item in order, computed by as many threads as there are cores, a little ahead."""
    num_threads = len(os.sched_getaffinity(0))
    waiting: deque[Future[ResultT]] = deque()
    with ThreadPoolExecutor(num_threads, "images") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
