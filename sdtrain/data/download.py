"""DOWNLOAD: selected rows -> pictures, with img2dataset as the engine and a reason for every picture not had."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.data.canonical import publish_shard, raw_shard
from sdtrain.data.config import DownloadConfig, PictureRecipe
from sdtrain.data.dataset import DatasetDir
from sdtrain.data.files import raise_if_disk_full, scratch
from sdtrain.data.img2dataset_child import COLUMNS, Request, ShardRequest
from sdtrain.data.manifest import Output, ShardReport, describe_outputs, fingerprint, require_entry
from sdtrain.data.stage import Stage
from sdtrain.errors import UserError

# Settings that say how pictures are fetched, not what becomes of them: changing one redoes nothing.
_HOW = {"timeout_s", "retries", "threads", "shards_per_process"}
_LOG_LINES = 5
_END_S = 10


def _shards(dataset: DatasetDir, recipe: PictureRecipe) -> list[int]:
    return list(_selection(dataset))


def _fingerprint(dataset: DatasetDir, recipe: PictureRecipe, shard: int) -> str:
    # Of the selection, this shard alone: the others may change without touching it.
    config = recipe.download.model_dump(mode="json", exclude=_HOW)
    return fingerprint("download/1", config | {"rows": _selection(dataset)[shard].sha256})


def _run(dataset: DatasetDir, recipe: PictureRecipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    config = recipe.download
    if config.encode_format == "png" and config.encode_quality > 9:
        raise UserError(
            f"For PNG, download.encode_quality is a compression level from 0 to 9, not {config.encode_quality}."
        )
    for shard in shards:
        # A shard that is being replaced must not pass for finished if this is killed half way.
        dataset.manifest_entry("download", shard).unlink(missing_ok=True)
    with scratch(dataset.root, f"download-{shards[0]:05d}") as folder:
        keys = {shard: pq.read_table(dataset.selection(shard), columns=["key"])["key"].to_pylist() for shard in shards}
        request = _write_request(dataset, config, shards, keys, folder)
        with _child(request, folder / "log.txt") as finished:
            for shard in finished:
                yield _publish(dataset, folder, shard, keys[shard])


def _publish(dataset: DatasetDir, folder: Path, shard: int, keys: list[str]) -> ShardReport:
    raw = raw_shard(folder, shard)
    counts = publish_shard(dataset, raw, keys)
    for path in (raw.tar, raw.table, raw.stats):
        path.unlink()
    # Not the statistics, which hold times and so differ from run to run.
    outputs = describe_outputs(dataset, [dataset.images_tar(shard), dataset.images_table(shard)])
    dropped = {str(reason): counts[reason] for reason in sorted(filter(None, counts))}
    return ShardReport(
        stage="download", shard=shard, num_in=len(keys), num_out=counts[None], dropped=dropped, outputs=outputs
    )


def _write_request(
    dataset: DatasetDir, config: DownloadConfig, shards: Sequence[int], keys: dict[int, list[str]], folder: Path
) -> Path:
    requests = []
    for shard in shards:
        rows = pq.read_table(dataset.selection(shard), columns=COLUMNS).select(COLUMNS)
        path = folder / f"{shard:05d}.arrow"
        with pa.ipc.new_file(path, rows.schema) as writer:
            writer.write_table(rows)
        requests.append(ShardRequest(shard=shard, rows=path))
    # img2dataset numbers the rows of a shard itself; it must arrive at the keys of the selection.
    digits = len(keys[shards[0]][0]) - max(5, len(str(shards[0])))
    request = folder / "request.json"
    request.write_text(Request(config=config, output=folder, digits=digits, shards=requests).model_dump_json())
    return request


@contextmanager
def _child(request: Path, log: Path) -> Iterator[Iterator[int]]:
    """Starts a child for the request; yields an iterator over the shards that it finishes. It ends with the block."""
    # In our process group, so that Ctrl-C and a job scheduler's signals reach it too.
    command = [sys.executable, "-m", "sdtrain.data.img2dataset_child", str(request)]
    with log.open("w") as errors:
        child = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment()
        )
    try:
        yield _finished(child, log)
    finally:
        child.kill()
        child.wait(_END_S)
        for pipe in (child.stdin, child.stdout):
            if pipe:
                pipe.close()


def _finished(child: subprocess.Popen[str], log: Path) -> Iterator[int]:
    lines: IO[str] | None = child.stdout
    for line in lines or ():
        yield int(json.loads(line)["shard"])
    if child.wait() != 0:
        text = log.read_text(errors="replace")
        if os.strerror(errno.ENOSPC) in text:
            raise_if_disk_full(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), log.parent)
        tail = " | ".join(text.strip().splitlines()[-_LOG_LINES:]) or "it wrote nothing"
        raise UserError(
            f"The download process ended with code {child.returncode} before its shards were done. Its last words: "
            f"{tail}. Finished shards are kept; run the same command again."
        )


def _environment() -> dict[str, str]:
    # One thread each for OpenCV's and NumPy's own pools: shards are what runs side by side.
    return os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}


def _selection(dataset: DatasetDir) -> dict[int, Output]:
    entry = dataset.manifest_entry("select", 0)
    changed_ns = entry.stat().st_mtime_ns if entry.exists() else 0
    return _read_selection(dataset, changed_ns)


@lru_cache(maxsize=4)
def _read_selection(dataset: DatasetDir, changed_ns: int) -> dict[int, Output]:
    # Kept, because every shard's fingerprint asks for it, and at scale it lists tens of thousands of files.
    outputs = require_entry(dataset, "select", 0).outputs
    return {int(Path(name).stem): output for name, output in sorted(outputs.items())}


DOWNLOAD: Stage[PictureRecipe] = Stage("download", _shards, _fingerprint, _run)
