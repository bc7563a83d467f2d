"""The record of what is finished: one JSON entry a stage and shard, written last."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sdtrain.dataset.files import publish, sha256_of
from sdtrain.dataset.layout import DatasetDir, current_stage
from sdtrain.dataset.shard_report import Output, ShardReport, parse_entry
from sdtrain.dataset.storage import storage_of
from sdtrain.errors import UserError


def describe_outputs(dataset: DatasetDir, paths: Iterable[Path]) -> dict[str, Output]:
    """Digests and sizes of finished files, by their name inside the dataset."""
    return {dataset.relative(p): Output(sha256=sha256_of(p), bytes=p.stat().st_size) for p in paths}


def write_entry(dataset: DatasetDir, entry: ShardReport, beside: Iterable[Path] = ()) -> None:
    """Makes the shard count as finished, on S3 first. Call it after every output has its final name.

    Args:
        dataset: whose.
        entry: of the shard.
        beside: files that its outputs need and it does not list.
    """
    path, content = dataset.manifest_entry(entry.stage, entry.shard), entry.model_dump_json(indent=1) + "\n"
    storage_of(dataset).push(path, content.encode(), entry.outputs, beside)
    with publish(path) as temporary:
        temporary.write_text(content)


def forget_entry(dataset: DatasetDir, stage: str, shard: int) -> None:
    """Makes a shard count as not finished, before its outputs are touched."""
    storage_of(dataset).discard(dataset.manifest_entry(stage, shard))


def read_entry(dataset: DatasetDir, stage: str, shard: int) -> ShardReport | None:
    """The entry of a finished shard, or None.

    Raises:
        UserError: the entry exists but was written by another version, or is damaged.
    """
    path = dataset.manifest_entry(stage, shard)
    return parse_entry(path.read_bytes(), path) if path.exists() else None


def require_entry(dataset: DatasetDir, stage: str, shard: int) -> ShardReport:
    """The entry of an upstream shard whose output is about to be read.

    Raises:
        UserError: the upstream stage has not finished that shard.
    """
    entry = read_entry(dataset, stage, shard)
    if entry is None:
        raise UserError(
            f"Shard {shard:05d} of stage '{stage}' is not finished in {dataset.root}. Run `sdtrain build` (or the "
            "build flow) again: it continues where it stopped."
        )
    return entry


def entries(dataset: DatasetDir, stage: str) -> list[ShardReport]:
    """All finished shards of a stage, in order."""
    folders = dataset.manifest_folders(stage)
    shards = {int(path.stem) for folder in folders for path in folder.glob("[0-9]*.json")}
    return [require_entry(dataset, stage, shard) for shard in sorted(shards)]


def recorded_stages(dataset: DatasetDir) -> list[str]:
    """The names of all stages that have finished shards, in no particular order."""
    return sorted({current_stage(path.name) for path in (dataset.root / "manifest").glob("*") if path.is_dir()})


def is_whole(dataset: DatasetDir, entry: ShardReport) -> bool:
    """Whether every output of the entry still lies there, or on S3, with its recorded size."""
    storage = storage_of(dataset)
    return all(storage.has(name, output.bytes) for name, output in entry.outputs.items())
