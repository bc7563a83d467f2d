"""Holds the samples in question: where they are in a dataset's shards, or were before they were removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sdtrain.dataset.files import read_parquet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.removal_ledger import key_digest
from sdtrain.exposure.removed_rows import NO_ROW, RemovedRows, read_removed_rows
from sdtrain.exposure.shard_rows import Ints, ShardRows, ranks
from sdtrain.exposure.trained import table_folder
from sdtrain.loading.sample_record import SampleRecord, Stage
from sdtrain.loading.shard_catalog import Catalogue, footer_digest
from sdtrain.pack.captions import LIST

LOCATED = pa.schema(
    [
        ("key", pa.string()),  # digest of the uid
        ("uid", pa.string()),  # none where a removal left only the digest
        ("url", pa.string()),
        ("caption", pa.string()),
        ("captions", LIST),  # all of them, where the latents' table has several
        ("root", pa.string()),  # of the dataset
        ("table", pa.string()),
        ("name", pa.int64()),  # `ShardRows`: its present row, or -1 - its place in the file of removed rows
    ]
)
Locate = Callable[[DatasetDir, Stage], pa.Table]
"""(dataset, stage) -> the samples in question that its shards hold or held: rows of LOCATED."""

UNKNOWN, ABSENT = -1, -2
"""Instead of a sample's number: its shard has changed untraceably, or the run's data did not hold it."""


def removed_as_located(dataset: DatasetDir, rows: pa.Table, places: Ints) -> pa.Table:
    """Removed samples, given by their rows and places in the file of removed rows, as rows of LOCATED."""
    nothing = pa.nulls(len(rows), pa.string())
    described = [nothing, nothing, nothing, pa.nulls(len(rows), LIST)]
    columns = [rows["uid"], *described, _root(dataset, rows), rows["table"], pa.array(-1 - places)]
    return pa.table(columns, names=LOCATED.names).cast(LOCATED)


def present_as_located(dataset: DatasetDir, rows: pa.Table) -> pa.Table:
    """Samples that are there, with columns uid, url, caption, table, row and perhaps captions, as rows of LOCATED."""
    keys = pa.array([key_digest("uid", uid) for uid in rows["uid"].to_pylist()], pa.string())
    described = [rows[name] for name in ("uid", "url", "caption")]
    captions = rows["captions"] if "captions" in rows.column_names else pa.nulls(len(rows), LIST)
    columns = [keys, *described, captions, _root(dataset, rows), rows["table"], rows["row"]]
    return pa.table(columns, names=LOCATED.names).cast(LOCATED)


def _root(dataset: DatasetDir, rows: pa.Table) -> pa.Array:
    return pa.repeat(pa.scalar(str(dataset.root)), len(rows))


def locate_removed(dataset: DatasetDir, stage: Stage) -> pa.Table:
    """All samples that were removed since their rows are recorded: a `Locate`."""
    rows = read_removed_rows(dataset.removed_rows)
    here = pc.and_(pc.equal(rows["stage"], stage), pc.not_equal(rows["row"], NO_ROW))
    return removed_as_located(dataset, rows.filter(here), np.flatnonzero(here.to_numpy()))


def sample_numbers(record: SampleRecord, source: int, dataset: DatasetDir, located: pa.Table) -> Ints:
    """The number that each located sample had in a run, or UNKNOWN or ABSENT.

    The work for a shard that holds any of them grows with its rows; there is none for other shards.
    """
    numbers = np.full(len(located), ABSENT, np.int64)
    shards = _Shards(record, source, dataset)
    for table, here in _by_table(located["table"]):
        numbers[here] = shards.numbers(table, located["name"].to_numpy()[here])
    return numbers


def untraced(record: SampleRecord, source: int, dataset: DatasetDir) -> int:
    """How many of a dataset's shards, as a run recorded them, cannot be traced to what is there now."""
    recorded, shards = record.sources[source], _Shards(record, source, dataset)
    present = {
        shard.table: shard.digest for shard in Catalogue(table_folder(dataset, record.stage), record.sizes).shards
    }
    changed = [
        (table, digest)
        for table, digest in zip(recorded.tables, recorded.digests, strict=True)
        if present.get(table) != digest
    ]
    return sum(shards.as_recorded(table, digest) is None for table, digest in changed)


def _by_table(tables: pa.ChunkedArray) -> Iterator[tuple[str, NDArray[np.intp]]]:
    encoded = tables.combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(encoded.dictionary)))[:-1]
    for code, here in enumerate(np.split(order, ends)):
        if len(here):
            yield encoded.dictionary[code].as_py(), here


class _Shards:
    """The shards of one dataset as a run recorded them, and as they are now."""

    def __init__(self, record: SampleRecord, source: int, dataset: DatasetDir) -> None:
        self._record, self._source = record, record.sources[source]
        self._first = record.first_of(source)
        self._folder = table_folder(dataset, record.stage)
        self._removed = RemovedRows(read_removed_rows(dataset.removed_rows))

    def numbers(self, table: str, names: Ints) -> Ints:
        """The numbers of samples of one shard, by their names in `ShardRows`."""
        shard = self._source.numbers.get(table)
        if shard is None:
            return np.full(len(names), ABSENT)
        whole = self.as_recorded(table, self._source.digests[shard])
        if whole is None:
            return np.full(len(names), UNKNOWN)
        numbers = np.full(len(names), ABSENT)
        if len(whole):
            order = np.argsort(whole)
            rows = order[np.searchsorted(whole, names, sorter=order).clip(max=len(whole) - 1)]
            sizes, within = _sizes_and_ranks(self._record, self._folder / table, self._removed.rows, whole)
            found = self._first + self._source.firsts[shard][sizes[rows]] + within[rows]
            numbers = np.where(whole[rows] == names, found, numbers)
        return numbers

    def as_recorded(self, table: str, digest: str) -> Ints | None:
        """The names of the shard's samples in the run's order; None if that is not known."""
        places, path = self._removed.of(self._record.stage, table), self._folder / table
        try:
            num_rows, present = pq.read_metadata(path).num_rows, footer_digest(path)
        except (OSError, pa.ArrowException):  # the shard is gone
            return None
        return ShardRows(num_rows, present, self._removed.rows.take(places), places).at(digest)


def _sizes_and_ranks(record: SampleRecord, path: Path, removed: pa.Table, whole: Ints) -> tuple[Ints, Ints]:
    """The number of each row's size, and its place among the shard's rows of that size."""
    if len(record.sizes) == 1:
        return np.zeros(len(whole), np.int64), np.arange(len(whole))
    present = read_parquet(path, ["height", "width"])
    sides = np.stack([np.where(whole >= 0, _at(present[name], whole), _at(removed[name], -1 - whole)) for name in
                      ("height", "width")], axis=1)  # fmt: skip
    sizes = np.array([record.sizes.index((height, width)) for height, width in sides.tolist()], np.int64)
    return sizes, ranks(sizes)


def _at(column: pa.ChunkedArray, places: Ints) -> Ints:
    """The values at some places; anything for places outside."""
    values = pc.fill_null(column, 0).to_numpy()
    return values[places.clip(0, max(0, len(values) - 1))] if len(values) else np.zeros_like(places)
