"""Starts download processes and defines the messages between them and this one.

The process is `sdtrain.download.worker`: it gets a `Request` and answers with a `Finished` for each shard.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel

from sdtrain.dataset.config import DownloadConfig
from sdtrain.dataset.files import raise_if_disk_full
from sdtrain.errors import UserError

_LOG_LINES = 5
_END_S = 10


class RetryRequest(BaseModel):
    """Of a finished shard, only the rows with these reasons are fetched; all else is taken over."""

    tar: Path
    table: Path
    reasons: list[str]


class ShardRequest(BaseModel):
    """One shard to do."""

    shard: int
    selection: Path
    fingerprint: str
    retry: RetryRequest | None = None


class Request(BaseModel):
    """The work of one process: shards one after the other, the last rows of one beside the first of the next."""

    config: DownloadConfig
    output: Path
    removed: Path | None = None
    """The dataset's ledger of images that may not come back, if it has one."""
    shards: list[ShardRequest]


class Finished(BaseModel):
    """A shard is done: its files lie in the request's `output`.

    Attributes:
        shard: its number.
        tar_sha256: its tar's digest.
        num_fetched: rows that were fetched now.
        num_unreached: of these, those whose host could not be reached.
    """

    shard: int
    tar_sha256: str
    num_fetched: int
    num_unreached: int


@contextmanager
def download_process(request: Request) -> Iterator[Iterator[Finished]]:
    """Starts a process for the request; yields an iterator over what it finishes. It ends with the block.

    Its request and log lie in the request's output folder too.
    """
    path, log = request.output / "request.json", request.output / "log.txt"
    path.write_text(request.model_dump_json())
    # In our process group, so that Ctrl-C and a job scheduler's signals reach it too.
    command = [sys.executable, "-m", "sdtrain.download.worker", str(path)]
    with log.open("w") as errors:
        child = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment(request)
        )
    try:
        yield _finished(child, log)
    finally:
        child.kill()
        child.wait(_END_S)
        for pipe in (child.stdin, child.stdout):
            if pipe:
                pipe.close()


def _finished(child: subprocess.Popen[str], log: Path) -> Iterator[Finished]:
    for line in child.stdout or ():
        yield Finished.model_validate_json(line)
    if child.wait() != 0:
        text = log.read_text(errors="replace")
        if os.strerror(errno.ENOSPC) in text:
            raise_if_disk_full(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), log.parent)
        tail = " | ".join(text.strip().splitlines()[-_LOG_LINES:]) or "it wrote nothing"
        raise UserError(
            f"The download process ended with code {child.returncode} before its shards were done. Its last words: "
            f"{tail}. Finished shards are kept; run the same command again."
        )


def _environment(request: Request) -> dict[str, str]:
    return os.environ | {
        # One thread each for OpenCV's and NumPy's own pools: images are what is done side by side.
        "OMP_NUM_THREADS": "1",
        # OpenCV reads its settings when it is imported. The header's reader has refused such images already.
        "OPENCV_IO_MAX_IMAGE_PIXELS": str(request.config.max_pixels),
        "OPENCV_LOG_LEVEL": "OFF",
    }
