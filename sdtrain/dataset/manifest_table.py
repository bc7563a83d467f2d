"""Answers questions about all entries of a stage from one table, which follows the entries' files.

The JSON files are the record; the table beside them (`manifest/STAGE.parquet`) is a copy that may be deleted, damaged
or behind at any time. A row counts as long as size and time of its file are the same, so asking costs one listing and
reads the files that changed since.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sdtrain.dataset.files import publish
from sdtrain.dataset.shard_report import ShardReport, parse_entry
from sdtrain.errors import UserError

_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        *((name, pa.int64()) for name in ("mtime_ns", "file_bytes", "num_in", "num_out", "num_bytes")),
        *((name, pa.float64()) for name in ("seconds", "finished_at")),
        ("dropped", pa.map_(pa.string(), pa.int64())),
        *((name, pa.list_(pa.string())) for name in ("notes", "tables")),
        ("entry", pa.large_binary()),
    ]
)
_WORTH_WRITING = 256
"""Entries that the table must lack before it is written again: fewer are read faster than it is written."""
_BYTES_WORTH_WRITING = 1 << 20
"""Or the size of one of them: the selection's lists a file for each shard."""
_SHARE_WORTH_WRITING = 0.05
"""And the share of all, so that a build that is watched writes the table a few dozen times, not once a look."""
_QUIET_NS = 60_000_000_000
"""A stage is quiet, and its table written however small that share, once no entry has changed for so long."""
_STILL_CHANGING_NS = 2_000_000_000
"""A file that changed twice within one tick of its file system's clock looks unchanged: younger ones are read again."""
_CLOCKS_DIFFER_NS = 600_000_000_000
"""As are those of a file server whose clock is ahead; where ours was set back, older files lie in the future."""
_ENTRY = re.compile(r"([0-9]{5}|[1-9][0-9]{5,8})[.]json")
_CACHED_STAGES = 16
_BATCH_ROWS = 4096
"""Entries held at once as Python's objects, which take more memory than the table's rows."""

_cached: dict[Path, pa.Table] = {}
_lock = Lock()


class StageEntries(Sequence[ShardReport]):
    """The entries of a stage's finished shards, in the shards' order; each is parsed when it is asked for.

    Attributes:
        table: a row for each: `shard`, counts, `num_bytes` of the outputs, `seconds`, `dropped`, `notes`, `tables`.
        shards: their numbers, (N,), rising.
    """

    def __init__(self, folder: Path, table: pa.Table) -> None:
        self._folder, self.table = folder, table
        self.shards: NDArray[np.int32] = table["shard"].to_numpy()

    @cached_property
    def _contents(self) -> pa.Array:
        """The entries' files; read when first asked for, as most questions are answered by the other columns."""
        table = _with_contents(self._folder, self.table)
        with _lock:
            if _cached.get(self._folder) is self.table:  # who asks once asks again
                _cached[self._folder] = table
        return table["entry"].combine_chunks()

    def __len__(self) -> int:
        return len(self.shards)

    @overload
    def __getitem__(self, index: int) -> ShardReport: ...
    @overload
    def __getitem__(self, index: slice) -> list[ShardReport]: ...
    def __getitem__(self, index: int | slice) -> ShardReport | list[ShardReport]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return parse_entry(self._contents[int(index)].as_py(), lambda: _path(self._folder, int(self.shards[index])))

    def __iter__(self) -> Iterator[ShardReport]:
        return (self[number] for number in range(len(self)))

    def get(self, shard: int) -> ShardReport | None:
        """The entry of a shard; None if it is not finished."""
        row = int(np.searchsorted(self.shards, shard))
        return self[row] if row < len(self) and self.shards[row] == shard else None

    def below(self, limit: int) -> StageEntries:
        """Those of the shards with lower numbers."""
        return StageEntries(self._folder, self.table.slice(0, int(np.searchsorted(self.shards, limit))))

    def with_others(self, others: StageEntries) -> StageEntries:
        """With the entries of shards that only `others` has."""
        if not len(others):
            return self
        own = pc.is_in(others.table["shard"], value_set=self.table["shard"])
        others_table = _with_contents(others._folder, others.table).filter(pc.invert(own))
        table = pa.concat_tables([_with_contents(self._folder, self.table), others_table])
        return StageEntries(self._folder, table.sort_by("shard").combine_chunks())

    def total(self, column: str) -> int:
        """The sum of a column of whole numbers."""
        return pc.sum(self.table[column]).as_py() or 0

    def dropped(self) -> Counter[str]:
        """Samples dropped, by reason."""
        maps = self.table["dropped"].combine_chunks()
        if not len(maps):
            return Counter()
        counted = pa.table({"reason": maps.keys, "num": maps.items}).group_by("reason").aggregate([("num", "sum")])
        return Counter(dict(zip(counted["reason"].to_pylist(), counted["num_sum"].to_pylist(), strict=True)))

    def listed(self, column: str) -> list[str]:
        """The different elements of a column of lists, in the shards' order."""
        found: list[str] = pc.unique(pc.list_flatten(self.table[column])).to_pylist()
        return found


def stage_entries(folder: Path) -> StageEntries:
    """Brings the table of a stage's entries up to date; `folder` is `manifest/STAGE`.

    Raises:
        UserError: an entry was written by another version, or is damaged.
    """
    with _lock:
        listed = _listing(folder)
        before = _cached.get(folder)
        is_written = len(listed) >= _WORTH_WRITING or listed[:, 2].max(initial=0) >= _BYTES_WORTH_WRITING
        kept = _read_counts(folder) if before is None and is_written else before
        table = _refreshed(folder, listed, _SCHEMA.empty_table() if kept is None else kept)
        if before is None and len(_cached) >= _CACHED_STAGES:
            _cached.clear()
        _cached[folder] = table
        return StageEntries(folder, table)


def write_table(folder: Path) -> tuple[Path, int]:
    """Brings the table's file up to date, however little it lacks; returns it and its number of entries.

    UserError if an entry cannot be read, or the file cannot be written.
    """
    table = _with_contents(folder, stage_entries(folder).table)
    written = _read(folder)
    if written is None or not written.equals(table):
        with publish(_file(folder)) as temporary:
            pq.write_table(table, temporary, compression="zstd")
    return _file(folder), len(table)


def stored_entries(folder: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yields shard, time in ns (below 0 if not settled) and content of the entries in the table's file alone.

    UserError if it is missing or damaged; the entries' files may say something else.
    """
    try:
        with pq.ParquetFile(_file(folder)) as file:
            for batch in file.iter_batches(_BATCH_ROWS, columns=["shard", "mtime_ns", "entry"]):
                yield from zip(*(batch[name].to_pylist() for name in ("shard", "mtime_ns", "entry")), strict=True)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{_file(folder)} is damaged. Delete it and run the same command again.") from error


def _listing(folder: Path) -> NDArray[np.int64]:
    """Shard, time and size of each entry's file, (N, 3), by shard."""
    asked_ns, found = time.time_ns(), list[tuple[int, int, int]]()
    with suppress(FileNotFoundError), os.scandir(folder) as files:
        for file in files:
            if _ENTRY.fullmatch(file.name):
                try:
                    status = file.stat()
                except FileNotFoundError:  # deleted since it was listed
                    continue
                found.append((int(file.name[:-5]), status.st_mtime_ns, status.st_size))
    listed = np.array(found, np.int64).reshape(-1, 3)
    age_ns = asked_ns - listed[:, 1]
    listed[(age_ns <= _STILL_CHANGING_NS) & (age_ns >= -_CLOCKS_DIFFER_NS), 1] = -1
    return listed[np.argsort(listed[:, 0])]


def _refreshed(folder: Path, listed: NDArray[np.int64], kept: pa.Table) -> pa.Table:
    stamps = _stamps(kept)
    if np.array_equal(stamps, listed) and not (listed[:, 1] < 0).any():
        return kept
    rows, is_same = _places(listed, stamps)
    fresh = _parsed(folder, listed[~is_same])
    # Indices in an array make pyarrow load pandas.
    table = pa.concat_tables([kept.take(rows[is_same]), fresh]) if is_same.any() else fresh
    table = table.sort_by("shard").combine_chunks()
    if _is_worth_writing(fresh, len(table)):
        table = _with_contents(folder, table)
        _write(folder, table)
    return table


def _is_worth_writing(fresh: pa.Table, num_all: int) -> bool:
    times, sizes = (fresh[name].to_numpy() for name in ("mtime_ns", "file_bytes"))
    num_settled = int((times >= 0).sum())
    is_quiet = time.time_ns() - times.max(initial=0) > _QUIET_NS
    is_many = num_settled >= max(_WORTH_WRITING, 0 if is_quiet else _SHARE_WORTH_WRITING * num_all)
    return is_many or bool(sizes[times >= 0].max(initial=0) >= _BYTES_WORTH_WRITING)


def _with_contents(folder: Path, table: pa.Table) -> pa.Table:
    """The table with the content of each entry, from the table's file or, where that is out of date, its own."""
    lacking = pc.is_null(table["entry"])
    if not pc.any(lacking).as_py():
        return table
    stored = _read(folder)
    stored = _SCHEMA.empty_table() if stored is None else stored
    stamps = _stamps(table)
    places, is_same = _places(stamps, _stamps(stored))
    found = stored["entry"].take(pa.array(places, mask=~is_same)) if len(stored) else table["entry"]
    contents = pc.if_else(lacking, found, table["entry"])
    if contents.null_count:  # another process has written the file since
        contents = pa.chunked_array([_contents_of(folder, table["shard"], contents)])
    return table.set_column(table.schema.get_field_index("entry"), "entry", contents)


def _contents_of(folder: Path, shards: pa.ChunkedArray, contents: pa.ChunkedArray) -> pa.Array:
    rows = zip(shards.to_pylist(), contents.to_pylist(), strict=True)
    try:
        read = [_path(folder, shard).read_bytes() if content is None else content for shard, content in rows]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} was deleted while it was read. Run the same command again.") from error
    return pa.array(read, pa.large_binary())


def _stamps(table: pa.Table) -> NDArray[np.int64]:
    """Shard, time and size of each row's file, (N, 3)."""
    return np.stack([table[name].to_numpy().astype(np.int64) for name in ("shard", "mtime_ns", "file_bytes")], axis=1)


def _places(asked: NDArray[np.int64], stamps: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For each asked stamp the row of its shard among `stamps`, and whether that is the same file, settled."""
    if not len(stamps):
        return np.zeros(len(asked), np.int64), np.zeros(len(asked), bool)
    rows = np.searchsorted(stamps[:, 0], asked[:, 0]).clip(max=len(stamps) - 1)
    return rows, (stamps[rows] == asked).all(axis=1) & (asked[:, 1] >= 0)


def _parsed(folder: Path, listed: NDArray[np.int64]) -> pa.Table:
    batches = (listed[first : first + _BATCH_ROWS] for first in range(0, len(listed), _BATCH_ROWS))
    return pa.concat_tables([_SCHEMA.empty_table(), *(_parsed_batch(folder, batch) for batch in batches)])


def _parsed_batch(folder: Path, listed: NDArray[np.int64]) -> pa.Table:
    rows = []
    for shard, mtime_ns, file_bytes in listed.tolist():
        path = _path(folder, shard)
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # deleted since it was listed
            continue
        entry = parse_entry(content, path)
        rows.append(
            {
                **{"shard": shard, "mtime_ns": mtime_ns, "file_bytes": file_bytes, "entry": content},
                **{"num_in": entry.num_in, "num_out": entry.num_out, "seconds": entry.seconds},
                "finished_at": entry.finished_at,
                "num_bytes": sum(output.bytes for output in entry.outputs.values()),
                **{"dropped": list(entry.dropped.items()), "notes": entry.notes},
                "tables": [name for name in entry.outputs if name.endswith(".parquet")],
            }
        )
    return pa.Table.from_pylist(rows, _SCHEMA)


def _path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.json"


def _file(folder: Path) -> Path:
    return folder.with_suffix(".parquet")


def _read(folder: Path, columns: Sequence[str] | None = None) -> pa.Table | None:
    try:
        with pq.ParquetFile(_file(folder)) as file:
            return file.read(columns) if file.schema_arrow.equals(_SCHEMA) else None
    except (OSError, pa.ArrowException):
        return None


def _read_counts(folder: Path) -> pa.Table | None:
    """The table of a stage's file without the entries themselves, which are null."""
    table = _read(folder, [name for name in _SCHEMA.names if name != "entry"])
    return None if table is None else table.append_column("entry", pa.nulls(len(table), pa.large_binary()))


def _write(folder: Path, table: pa.Table) -> None:
    # Who may only read the dataset, or finds its disk full, is answered all the same.
    with suppress(OSError, UserError), publish(_file(folder)) as temporary:
        pq.write_table(table, temporary, compression="zstd")
