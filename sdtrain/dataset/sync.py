"""Fetches and stores a dataset's files on S3, and evicts them from a work folder that is to stay small.

Tables are fetched before a stage begins, tars when they are opened. A file in the work folder records whether large
files are evicted, so that all workers of a build agree; tables stay.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.local_storage import Stored
from sdtrain.dataset.manifest import ShardReport, entries, read_entry, recorded_stages
from sdtrain.dataset.storage import storage_of
from sdtrain.errors import UserError

Part = Literal["all shards", "same shard", "first shard"]
"""The shards of another stage that a shard reads. "same shard": the one of its own number, whose large files
nothing else reads afterwards but `pack`, in parts."""
_FILE = ".s3-evict"
_STILL_CHANGING_NS = 2_000_000_000
"""A folder that changed twice within one tick of its file system's clock looks unchanged."""
_fetched_at_ns: dict[tuple[DatasetDir, str], int] = {}


def fetch_inputs(dataset: DatasetDir, inputs: Mapping[str, Part], shards: Sequence[int]) -> None:
    """Fetches the tables that `shards`, about to be made, read; does nothing for a local dataset.

    `inputs` maps the stages read to which of their shards.
    """
    if not storage_of(dataset).is_remote:
        return
    for stage, part in inputs.items():
        if part == "all shards":
            _fetch_all_tables(dataset, stage)
        elif part == "same shard":
            fetch_outputs(dataset, stage, shards, tars=False)
        else:
            first = read_entry(dataset, stage, 0) or next(iter(entries(dataset, stage)), None)
            fetch_outputs(dataset, stage, [first.shard] if first else [], tars=False)


def _fetch_all_tables(dataset: DatasetDir, stage: str) -> None:
    """Fetches the tables of a stage, unless this process did since its entries last changed: each batch asks."""
    folders = [folder for folder in dataset.manifest_folders(stage) if folder.exists()]
    changed_ns = max((folder.stat().st_mtime_ns for folder in folders), default=0)
    if _fetched_at_ns.get((dataset, stage)) == changed_ns:
        return
    fetch_outputs(dataset, stage, tars=False)
    if time.time_ns() - changed_ns > _STILL_CHANGING_NS:
        _fetched_at_ns[dataset, stage] = changed_ns


def fetch_tables(dataset: DatasetDir) -> None:
    """Fetches the tables of all stages."""
    for stage in recorded_stages(dataset):
        fetch_outputs(dataset, stage, tars=False)


def fetch_outputs(
    dataset: DatasetDir, stage: str, shards: Iterable[int] | None = None, tars: bool = True, as_they_are: bool = False
) -> None:
    """Fetches missing outputs of a stage's `shards`, by default all finished ones.

    `tars`: the large files too. `as_they_are`: also files that differ from the manifest, as an interrupted removal
    leaves them. UserError if an object is missing, or does not match the manifest.
    """
    storage = storage_of(dataset)
    if not storage.is_remote:
        return
    if shards is None:
        finished: Iterable[ShardReport] = entries(dataset, stage)
    else:
        finished = (entry for shard in shards if (entry := read_entry(dataset, stage, shard)))
    wanted: dict[str, Stored | None] = {}
    for entry in finished:
        for name, output in entry.outputs.items():
            if tars or not name.endswith(".tar"):
                wanted[name] = None if as_they_are else output
    storage.pull(wanted)


def fetch_if_stored(dataset: DatasetDir, *paths: Path) -> None:
    """Fetches missing files that no manifest entry lists (any more), if they are stored at all."""
    storage_of(dataset).pull({dataset.relative(path): None for path in paths})


def keep_local(dataset: DatasetDir, kept: bool) -> None:
    """Sets whether large files of finished shards stay in the work folder; nothing else for a local dataset.

    If they do not, those here now are evicted too. The dataset must be locked, without a removal in progress. UserError
    if a local dataset's files are to be evicted.
    """
    if not storage_of(dataset).is_remote:
        if not kept:
            raise UserError("Only files of a dataset on s3:// can leave this machine. Leave out --no-keep-local.")
        return
    marker = dataset.root / _FILE
    if kept:
        marker.unlink(missing_ok=True)
        return
    marker.touch()
    evict_finished(dataset)


def evict_finished(dataset: DatasetDir) -> None:
    """Evicts the large files of all finished shards, unless they are to stay."""
    if (dataset.root / _FILE).exists():
        for entry in (entry for stage in recorded_stages(dataset) for entry in entries(dataset, stage)):
            _evict(dataset, entry)


def evict_after(dataset: DatasetDir, entry: ShardReport, sources: Iterable[str]) -> None:
    """Evicts a newly recorded shard's large files, and those of the same number in `sources`, which only it read."""
    if not (dataset.root / _FILE).exists():
        return
    _evict(dataset, entry)
    for source in sources:
        if before := read_entry(dataset, source, entry.shard):
            _evict(dataset, before)


def _evict(dataset: DatasetDir, entry: ShardReport) -> None:
    """Evicts only files that S3 has just now: objects may have been deleted by hand, or by a rule of the bucket."""
    if dataset.removal.exists():  # a removal's files are ahead of their entries
        return
    storage = storage_of(dataset)
    for name, output in entry.outputs.items():
        path = dataset.root / name
        if name.endswith(".tar") and path.exists() and storage.has_copy(name, output.sha256):
            path.unlink()


def discard(dataset: DatasetDir, path: Path) -> None:
    """Deletes a file of a dataset, on S3 first."""
    storage_of(dataset).discard(path)


def push_files(dataset: DatasetDir, *paths: Path) -> None:
    """Stores on S3 files that no manifest entry lists."""
    storage_of(dataset).push_files(paths)


def read_part(dataset: DatasetDir, path: Path, offset: int, num_bytes: int) -> bytes:
    """Reads part of a dataset's file; from S3, without fetching the whole."""
    return storage_of(dataset).read_part(path, offset, num_bytes)


def fetch_shard_file(root: Path, path: Path, stage: str) -> None:
    """Fetches a file, named by its shard, of a stage's output if it is missing; does nothing for a local dataset.

    `root` is the dataset's work folder. UserError if the file does not match the local manifest, or no longer does.
    """
    if path.exists():
        return
    dataset = DatasetDir(root)
    storage = storage_of(dataset)
    if storage.is_remote:
        entry, name = read_entry(dataset, stage, int(path.stem)), dataset.relative(path)
        storage.pull({name: entry.outputs.get(name) if entry else None})
