"""A child process that downloads shards: concurrent requests, images made in threads, memory bounded by both.

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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from sdtrain.dataset.config import DownloadConfig
from sdtrain.download.http.client import Fetcher
from sdtrain.download.http.failures import FetchError
from sdtrain.download.rows import Selected, failed_row
from sdtrain.download.shard_job import ShardJob
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


async def _download(request: Request, report: Report) -> None:
    maker = ImageMaker(request.config)
    urls = _urls(request, maker)
    num_threads = max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0))))
    with ThreadPoolExecutor(num_threads) as threads:
        try:
            async with Fetcher(request.config) as fetcher, asyncio.TaskGroup() as group:
                for _ in range(_URLS_PER_CONNECTION * request.config.connections):
                    group.create_task(_work(urls, fetcher, threads, report))
        except ExceptionGroup as several:
            raise several.exceptions[0] from None  # the log's last words are what the user sees


def _urls(request: Request, maker: ImageMaker) -> Iterator[tuple[ShardJob, list[Selected]]]:
    """The rows of each URL to fetch, or once no rows for a shard that needs none."""
    for asked in request.shards:
        work = ShardJob(request, asked, maker)
        for rows in work.due() or ([],):
            yield work, rows


async def _work(
    urls: Iterator[tuple[ShardJob, list[Selected]]], fetcher: Fetcher, threads: ThreadPoolExecutor, report: Report
) -> None:
    for work, rows in urls:  # shared: each task takes the next
        if not rows or await _do_url(work, rows, fetcher, threads):
            report(await asyncio.get_running_loop().run_in_executor(threads, work.finish))


async def _do_url(work: ShardJob, rows: list[Selected], fetcher: Fetcher, threads: ThreadPoolExecutor) -> bool:
    try:
        body = (await fetcher.fetch(rows[0].url)).body
    except FetchError as error:
        return work.add([(failed_row(selected, error), None) for selected in rows])
    return work.add(await asyncio.get_running_loop().run_in_executor(threads, work.make, rows, body))


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
