"""Records finished work: one JSON entry per stage and shard, written last; merges those of the selections."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import MappingProxyType

from sdtrain.dataset.files import publish, sha256_of
from sdtrain.dataset.layout import DatasetDir, current_stage
from sdtrain.dataset.local_storage import LocalStorage
from sdtrain.dataset.manifest_table import StageEntries, stage_entries
from sdtrain.dataset.shard_report import Output, ShardReport, parse_entry
from sdtrain.dataset.storage import storage_of
from sdtrain.errors import UserError

_WRITTEN_AT_ONCE = 4096
"""Entries that await one sync of the disk together."""


@dataclass(frozen=True)
class _Bulk:
    """What a block of `bulk_reads` has read: the entries of stages, the selected shards, and the storage asked."""

    entries: dict[tuple[DatasetDir, str], StageEntries] = field(default_factory=dict)
    selected: dict[DatasetDir, Mapping[int, Output]] = field(default_factory=dict)
    storages: dict[DatasetDir, LocalStorage] = field(default_factory=dict)


_read_in_bulk: ContextVar[_Bulk | None] = ContextVar("read_in_bulk", default=None)


def describe_outputs(dataset: DatasetDir, paths: Iterable[Path]) -> dict[str, Output]:
    """Digests and sizes of finished files, by their name inside the dataset."""
    return {dataset.relative(p): Output(sha256=sha256_of(p), bytes=p.stat().st_size) for p in paths}


def write_entry(dataset: DatasetDir, entry: ShardReport, beside: Iterable[Path] = ()) -> None:
    """Records the shard as finished, on S3 first. Call it once every output has its final name.

    Files `beside` are those that its outputs need and the entry does not list.
    """
    with _stored(dataset, entry, beside):
        pass


def write_entries(dataset: DatasetDir, reports: Iterable[tuple[ShardReport, Iterable[Path]]]) -> None:
    """Records many shards, each with its files beside, as `write_entry` does one.

    They reach the disk together: waiting for each of 132,000 takes ten minutes.
    """
    waiting = iter(reports)
    while batch := list(islice(waiting, _WRITTEN_AT_ONCE)):
        with ExitStack() as names:
            for entry, beside in batch:
                names.enter_context(_stored(dataset, entry, beside, is_durable=False))
            os.sync()
    os.sync()


@contextmanager
def _stored(dataset: DatasetDir, entry: ShardReport, beside: Iterable[Path], is_durable: bool = True) -> Iterator[None]:
    """An entry that is stored remotely and written here, but has its final name only after the block."""
    path, content = dataset.manifest_entry(entry.stage, entry.shard), entry.model_dump_json(indent=1) + "\n"
    storage_of(dataset).push(path, content.encode(), entry.outputs, beside)
    with publish(path, is_durable) as temporary:
        temporary.write_text(content)
        yield


def forget_entry(dataset: DatasetDir, stage: str, shard: int) -> None:
    """Marks a shard as unfinished, before its outputs change."""
    storage_of(dataset).discard(dataset.manifest_entry(stage, shard))


def read_entry(dataset: DatasetDir, stage: str, shard: int) -> ShardReport | None:
    """The entry of a finished shard, or None; UserError if another version wrote it, or it is damaged."""
    if _read_in_bulk.get() is not None:
        return entries(dataset, stage).get(shard)
    path = dataset.manifest_entry(stage, shard)
    return parse_entry(path.read_bytes(), path) if path.exists() else None


@contextmanager
def bulk_reads() -> Iterator[None]:
    """Answers from one reading of a stage's entries: for questions about all shards, by one thread.

    What is recorded inside the block is not seen. A block inside another one reads nothing again.
    """
    token = _read_in_bulk.set(_read_in_bulk.get() or _Bulk())
    try:
        yield
    finally:
        _read_in_bulk.reset(token)


def require_entry(dataset: DatasetDir, stage: str, shard: int) -> ShardReport:
    """The entry of an upstream shard to read; UserError if that stage has not finished it."""
    entry = read_entry(dataset, stage, shard)
    if entry is None:
        raise UserError(
            f"Shard {shard:05d} of stage '{stage}' is not finished in {dataset.root}. Run `sdtrain build` (or the "
            "build flow) again: it continues where it stopped."
        )
    return entry


def entries(dataset: DatasetDir, stage: str) -> StageEntries:
    """The entries of a stage's finished shards, in order."""
    read = _read_in_bulk.get()
    if read is None:
        return _entries(dataset, stage)
    if (dataset, stage) not in read.entries:
        read.entries[dataset, stage] = _entries(dataset, stage)
    return read.entries[dataset, stage]


def _entries(dataset: DatasetDir, stage: str) -> StageEntries:
    found, *former = map(stage_entries, dataset.manifest_folders(stage))
    for other in former:
        found = found.with_others(other)
    return found


def selected_entries(dataset: DatasetDir, stage: str) -> StageEntries:
    """Those of the shards that are selected now, all without a selection.

    What an earlier, larger one has left may be used again.
    """
    found, num = entries(dataset, stage), num_selected_shards(dataset, None)
    return found if num is None else found.below(num)


def newest_change_ns(dataset: DatasetDir, stage: str) -> int:
    """When an entry of a stage was last written or copied here, in ns since 1970; 0 for a stage without entries."""
    listed = entries(dataset, stage).table["mtime_ns"].to_numpy()
    if len(listed) and listed.min() >= 0:  # none that may still be changing
        return int(listed.max())
    newest = 0
    for folder in dataset.manifest_folders(stage):
        with suppress(FileNotFoundError), os.scandir(folder) as files:
            newest = max([newest, *(file.stat().st_mtime_ns for file in files if file.name.endswith(".json"))])
    return newest


def require_entries(dataset: DatasetDir, stage: str, shards: Iterable[int]) -> Iterator[ShardReport]:
    """The entries of many upstream shards; UserError if that stage has not finished one of them."""
    finished = entries(dataset, stage)
    for shard in shards:
        yield finished.get(shard) or require_entry(dataset, stage, shard)


def recorded_stages(dataset: DatasetDir) -> list[str]:
    """The names of all stages with finished shards, unordered."""
    return sorted({current_stage(path.name) for path in (dataset.root / "manifest").glob("*") if path.is_dir()})


def is_whole(dataset: DatasetDir, entry: ShardReport) -> bool:
    """Whether every output of the entry still exists, here or on S3, with its recorded size."""
    storage = _storage(dataset)
    return all(storage.has(name, output.bytes) for name, output in entry.outputs.items())


def _storage(dataset: DatasetDir) -> LocalStorage:
    read = _read_in_bulk.get()
    if read is None:
        return storage_of(dataset)
    if dataset not in read.storages:
        read.storages[dataset] = storage_of(dataset)
    return read.storages[dataset]


def selection(dataset: DatasetDir) -> ShardReport:
    """Merges all selections' reports: counts summed, files in shard order; UserError if nothing is selected yet.

    There is the first selection, and one more each time metadata files were added.
    """
    return _selection(dataset, _changed_ns(dataset))


def selected_shards(dataset: DatasetDir) -> Mapping[int, Output]:
    """Shard number -> its selection file's digest, in order."""
    read = _read_in_bulk.get()
    if read is None:
        return _selected_shards(dataset, _changed_ns(dataset))
    if dataset not in read.selected:
        read.selected[dataset] = _selected_shards(dataset, _changed_ns(dataset))
    return read.selected[dataset]


def num_selected_shards(dataset: DatasetDir, recipe: object) -> int | None:
    """The number of selected shards, for later stages' `Stage.num_shards`; None before the first selection."""
    selections = entries(dataset, "select")
    # By the table, because an entry that lists 100,000 files takes a second to read.
    return len(selections.listed("tables")) if 0 in selections.shards else None


def _changed_ns(dataset: DatasetDir) -> tuple[int, ...]:
    folder = dataset.manifest_entry("select", 0).parent
    return tuple(path.stat().st_mtime_ns for path in sorted(folder.glob("*.json")))


# Both are cached, because every shard's fingerprint asks for them, and at scale they list over 100,000 files.


@lru_cache(maxsize=4)
def _selected_shards(dataset: DatasetDir, changed_ns: tuple[int, ...]) -> Mapping[int, Output]:
    outputs = _selection(dataset, changed_ns).outputs
    return MappingProxyType({shard_of(name): output for name, output in outputs.items()})


def shard_of(name: str) -> int:
    """The number in a selection's name; a `Path` would take as long as reading the entry."""
    return int(name.rpartition("/")[2].partition(".")[0])


@lru_cache(maxsize=4)
def _selection(dataset: DatasetDir, changed_ns: tuple[int, ...]) -> ShardReport:
    reports = list(entries(dataset, "select"))  # once: one lists all of its selection's shards
    if not reports or reports[0].shard != 0:
        require_entry(dataset, "select", 0)
    dropped, outputs = Counter[str](), dict[str, Output]()
    for report in reports:
        dropped.update(report.dropped)
        outputs |= report.outputs
    return ShardReport(
        stage="select",
        shard=0,
        num_in=sum(report.num_in for report in reports),
        num_out=sum(report.num_out for report in reports),
        dropped=dict(dropped),
        outputs=dict(sorted(outputs.items(), key=lambda item: shard_of(item[0]))),
        inputs=[name for report in reports for name in report.inputs],
        notes=list(dict.fromkeys(note for report in reports for note in report.notes)),
    )
