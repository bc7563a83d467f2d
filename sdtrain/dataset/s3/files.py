"""Handles single files of a dataset, on the local disk or on S3."""

from __future__ import annotations

from pathlib import Path

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import read_entry
from sdtrain.dataset.storage import storage_of


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
