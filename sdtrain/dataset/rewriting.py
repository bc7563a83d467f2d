"""Rewrites finished files without removed samples, in the usual ways or as a stage states."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdtrain.dataset.files import publish, read_parquet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.tars import BLOCK_BYTES, RECORD_BYTES, SampleIndex, index_samples

# Contravariant: a stage that reads part of the recipe also accepts the whole one.
RecipeT = TypeVar("RecipeT", contravariant=True)
Place = Callable[[Path, SampleIndex], dict[str, Any]]
"""(tar, sample) -> the table's columns that locate the sample in the tar."""


@dataclass(frozen=True)
class Removed:
    """Samples to remove from a shard.

    Attributes:
        table: the shard's, under its final name.
        uids: of the table's removed samples; none if an interrupted run has already dropped them.
        origins: removed samples that others of the table have texts of.
        finished: by stage, the shards that must be finished afterwards.
    """

    table: Path
    uids: Sequence[str]
    origins: Sequence[str]
    finished: Mapping[str, Collection[int]]


@dataclass(frozen=True, kw_only=True)
class Rewriting(Generic[RecipeT]):
    """How a stage's shards lose samples; after a kill, both steps run again.

    Attributes:
        origins: columns, where the table has them, that name other samples, whose texts its samples have -> SQL for the
            uids of these, one a row.
        has_tar: whether the table's samples lie in the tar beside it, neither of use without the other.
        drop: rewrites the files of one shard, leaving the rest byte for byte as it was.
        recount: (dataset, entry, tables) -> the manifest entry of files whose `tables` were rewritten; None keeps it.
    """

    origins: Mapping[str, str]
    has_tar: bool
    drop: Callable[[DatasetDir, RecipeT, int, Removed], None]
    recount: Callable[[DatasetDir, ShardReport, Sequence[Path]], ShardReport | None]


def drop_rows(table: Path, uids: Collection[str], described: Mapping[bytes, bytes] | None = None) -> None:
    """Rewrites a Parquet file without the rows of `uids`, a row group at a time; adds `described` to its metadata."""
    if not uids:
        return
    gone = pa.array(sorted(uids), pa.string())
    with pq.ParquetFile(table) as file, publish(table) as temporary:
        schema = file.schema_arrow.with_metadata({**(file.schema_arrow.metadata or {}), **(described or {})})
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for number in range(file.num_row_groups):
                rows = file.read_row_group(number)
                left = rows.filter(pc.invert(pc.is_in(rows["uid"], value_set=gone)))
                writer.write_table(left.replace_schema_metadata(schema.metadata), max(1, len(left)))


def drop_members(table: Path, uids: Collection[str], place: Place) -> None:
    """Rewrites a table without the rows of `uids`, and the tar beside it without the samples of their `key`."""
    if not uids:
        return
    tar, rows = table.with_suffix(".tar"), read_parquet(table)
    left = rows.filter(pc.invert(pc.is_in(rows["uid"], value_set=pa.array(sorted(uids), pa.string()))))
    copy_without(tar, set(rows["key"].to_pylist()) - set(left["key"].to_pylist()))
    # Read from the current tar, so that a table left unwritten by a killed run comes out the same.
    samples = {sample.key: sample for sample in index_samples(tar)}
    placed = [row | place(tar, samples[row["key"]]) for row in left.to_pylist()]
    with publish(table) as temporary:
        pq.write_table(pa.Table.from_pylist(placed, rows.schema), temporary, compression="zstd")


def count_rows(dataset: DatasetDir, entry: ShardReport, tables: Sequence[Path]) -> ShardReport:
    """The entry of a shard with one table: its rows came in, and those with a `reason`, if it has any, were dropped."""
    (table,) = tables
    with pq.ParquetFile(table) as file:
        num_in, dropped = file.metadata.num_rows, _count_reasons(file)
    counts = {"num_in": num_in, "num_out": num_in - dropped.total(), "dropped": dict(sorted(dropped.items()))}
    return described_again(dataset, entry, counts)


def _count_reasons(file: pq.ParquetFile) -> Counter[str]:
    counts = Counter[str]()
    if "reason" in file.schema_arrow.names:
        for batch in file.iter_batches(columns=["reason"]):
            counts.update({c["values"]: c["counts"] for c in batch["reason"].drop_null().value_counts().to_pylist()})
    return counts


def described_again(dataset: DatasetDir, entry: ShardReport, counts: dict[str, Any]) -> ShardReport:
    """The entry with new counts, and its files as they are now."""
    outputs = describe_outputs(dataset, [dataset.root / name for name in entry.outputs])
    return ShardReport.model_validate(entry.model_dump() | counts | {"outputs": outputs})


def copy_without(tar: Path, keys: Collection[str]) -> None:
    """Rewrites a tar without some samples, copying the others' headers and bodies unchanged."""
    samples = index_samples(tar)
    if not any(sample.key in keys for sample in samples):
        return
    with tar.open("rb") as source, publish(tar) as temporary, temporary.open("wb") as target:
        begin = 0
        for sample in samples:
            end = max(member.offset + _padded(member.size) for member in sample.members.values())
            if sample.key not in keys:
                _copy(source, target, begin, end)
            begin = end
        # Two empty blocks, padded to a whole record, as tarfile ends its files.
        target.write(bytes(2 * BLOCK_BYTES))
        target.write(bytes(-target.tell() % RECORD_BYTES))


def _copy(source: IO[bytes], target: IO[bytes], begin: int, end: int) -> None:
    source.seek(begin)
    while begin < end:
        part = source.read(min(end - begin, shutil.COPY_BUFSIZE))  # type: ignore[attr-defined]
        target.write(part)
        begin += len(part)


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _drop_rows(dataset: DatasetDir, recipe: object, shard: int, removed: Removed) -> None:
    drop_rows(removed.table, removed.uids)


def _drop_members(place: Place, dataset: DatasetDir, recipe: object, shard: int, removed: Removed) -> None:
    drop_members(removed.table, removed.uids, place)


def in_tar(place: Place = lambda tar, sample: {}) -> Rewriting[object]:
    """For a table whose rows name samples in the tar beside it by `key`, and locate them there if `place` is given."""
    return Rewriting(origins={}, has_tar=True, drop=partial(_drop_members, place), recount=count_rows)


IN_TABLE: Rewriting[object] = Rewriting(origins={}, has_tar=False, drop=_drop_rows, recount=count_rows)
"""For a table that holds all that its stage writes about a sample."""
