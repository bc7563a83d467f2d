"""A child process that makes shards of images from the web or a source on disk, in threads and bounded memory.

`python -m sdtrain.download.worker REQUEST.json` does the request's shards and prints a JSON line after each. It ends
when its standard input closes, which happens however its parent dies.

It relies on pyarrow working without pandas, which `_WithoutPandas` hides; tests/sdtrain/download/test_stage.py runs it.
"""

from __future__ import annotations

import asyncio
import importlib.abc
import logging
import os
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Protocol

from PIL import Image

from sdtrain.dataset.config import DownloadConfig
from sdtrain.download.http.client import Fetcher
from sdtrain.download.http.failures import FetchError
from sdtrain.download.rows import Selected, failed_row
from sdtrain.download.shard_job import Outcome, ShardJob
from sdtrain.download.source.reader import SourceReader
from sdtrain.download.worker_process import Finished, Request
from sdtrain.images.store import ImageMaker
from sdtrain.redaction import hide_secrets_in_logs

_URLS_PER_CONNECTION = 2
"""URLs in flight for each connection: one is fetched while another is made into an image."""
_MAX_THREADS = 4
Report = Callable[[Finished], None]


def main() -> None:
    """Does the request in the file named on the command line."""
    hide_secrets_in_logs()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Libraries print to standard output; keep that apart from the lines for the parent.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.meta_path.insert(0, _WithoutPandas())
    request = Request.model_validate_json(Path(sys.argv[1]).read_bytes())
    _quiet(request.config)
    asyncio.run(_download(request, lambda finished: print(finished.model_dump_json(), file=lines, flush=True)))


class Origin(Protocol):
    """Where the bytes of images come from: the web, or a source on this machine."""

    async def __call__(self, selected: Selected, is_verified: bool = True) -> bytes:
        """The bytes of a row's image; FetchError says why there are none.

        Without `is_verified`, from a server whose certificate is not.
        """


async def _download(request: Request, report: Report) -> None:
    maker = ImageMaker(request.config)
    urls = _urls(request, maker)
    num_threads = max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0))))
    with ThreadPoolExecutor(num_threads) as threads:
        try:
            async with _open_origin(request, num_threads) as (origin, num_tasks), asyncio.TaskGroup() as group:
                for _ in range(num_tasks):
                    group.create_task(_work(urls, origin, threads, report))
        except ExceptionGroup as several:
            raise several.exceptions[0] from None  # the log's last words are what the user sees


@asynccontextmanager
async def _open_origin(request: Request, num_threads: int) -> AsyncIterator[tuple[Origin, int]]:
    """Yields the origin, and how many tasks should ask it at a time."""
    if request.source is None:
        async with Fetcher(request.config) as fetcher:
            yield partial(_fetch, fetcher), _URLS_PER_CONNECTION * request.config.connections
        return
    # Disks answer sooner than images are made: a few are read ahead, so that few wait in memory.
    with closing(SourceReader(request.source)) as reader, ThreadPoolExecutor(1) as thread:
        yield partial(_read, reader, thread), 2 * num_threads


async def _fetch(fetcher: Fetcher, selected: Selected, is_verified: bool = True) -> bytes:
    return (await fetcher.fetch(selected.url, is_verified)).body


async def _read(
    reader: SourceReader, thread: ThreadPoolExecutor, selected: Selected, is_verified: bool = True
) -> bytes:
    # One thread takes rows in the order in which the tasks asked, that of the source.
    row = -1 if selected.source_row is None else selected.source_row
    return await asyncio.get_running_loop().run_in_executor(thread, reader.read, row, selected.url)


def _urls(request: Request, maker: ImageMaker) -> Iterator[tuple[ShardJob, list[Selected]]]:
    """The rows of each URL to fetch, or once no rows for a shard that needs none."""
    for asked in request.shards:
        work = ShardJob(request, asked, maker)
        for rows in work.due() or ([],):
            yield work, rows


async def _work(
    urls: Iterator[tuple[ShardJob, list[Selected]]], origin: Origin, threads: ThreadPoolExecutor, report: Report
) -> None:
    for work, rows in urls:  # shared: each task takes the next
        if not rows or await _do_url(work, rows, origin, threads):
            report(await asyncio.get_running_loop().run_in_executor(threads, work.finish))


async def _do_url(work: ShardJob, rows: list[Selected], origin: Origin, threads: ThreadPoolExecutor) -> bool:
    in_thread = partial(asyncio.get_running_loop().run_in_executor, threads)
    try:
        body = await origin(rows[0])
    except FetchError as error:
        if not work.may_prove(rows, error):
            return work.add(_failed(rows, error))
        try:
            body = await origin(rows[0], is_verified=False)
        except FetchError:
            return work.add(_failed(rows, error))
        return work.add(await in_thread(work.make_proven, rows, body, error))
    return work.add(await in_thread(work.make, rows, body))


def _failed(rows: Sequence[Selected], error: FetchError) -> list[Outcome]:
    return [(failed_row(selected, error), None) for selected in rows]


class _WithoutPandas(importlib.abc.MetaPathFinder):
    """Hides pandas, which pyarrow would import to recognise a Series: half of a child's start-up time."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


def _quiet(config: DownloadConfig) -> None:
    """Silences libraries about damaged images: the rows have reasons, and the messages would bury an error."""
    warnings.simplefilter("ignore")
    logging.getLogger("exifread").setLevel(logging.CRITICAL)
    Image.MAX_IMAGE_PIXELS = config.max_pixels  # Pillow itself refuses twice as many


def _end_with_parent() -> None:
    # Not through sys.stdin, whose lock the interpreter needs at exit.
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
