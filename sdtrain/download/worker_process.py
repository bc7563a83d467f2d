"""Starts download processes (`sdtrain.download.worker`) and defines the messages exchanged with them."""

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
from sdtrain.download.source.reader import SourceRequest
from sdtrain.errors import UserError

_LOG_LINES = 5
_END_S = 10


class EarlierShard(BaseModel):
    """A shard's published version, whose rows keep their outcomes, but for failures with a reason in `retried`.

    Where the `selection_changed`, rows that it lacks are fetched, and images are compared again with the metadata's
    digests.
    """

    tar: Path
    table: Path
    retried: list[str]
    selection_changed: bool


class ShardRequest(BaseModel):
    """One shard to download."""

    shard: int
    selection: Path
    fingerprint: str
    earlier: EarlierShard | None = None


class Request(BaseModel):
    """The work of one process: shards in order, the last rows of one overlapping the first of the next."""

    config: DownloadConfig
    output: Path
    removed: Path | None = None
    """The dataset's ledger of removed images, if it has one."""
    source: SourceRequest | None = None
    """Where the images are read, if not from the web."""
    shards: list[ShardRequest]


class Finished(BaseModel):
    """Reports a finished shard, whose files are in the request's `output`.

    `num_fetched` counts the rows fetched now, `num_unreached` those of them whose host could not be reached.
    """

    shard: int
    tar_sha256: str
    num_fetched: int
    num_unreached: int


@contextmanager
def download_process(request: Request) -> Iterator[Iterator[Finished]]:
    """Starts a process and yields an iterator over the shards it finishes; the process ends with the block.

    The output folder also holds its request and log.
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
        # One thread each for OpenCV's and NumPy's own pools: images are made in parallel instead.
        "OMP_NUM_THREADS": "1",
        # OpenCV reads it at import. `read_header` has already refused such images.
        "OPENCV_IO_MAX_IMAGE_PIXELS": str(request.config.max_pixels),
        "OPENCV_LOG_LEVEL": "OFF",
    }
