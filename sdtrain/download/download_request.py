"""What a download process is asked to do, and what it answers: the words between the two processes."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from sdtrain.dataset.config import DownloadConfig


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
