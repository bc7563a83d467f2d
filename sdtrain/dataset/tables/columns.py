"""Groups Parquet files by their columns, for one scan; footers are read once and remembered beside the manifest."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.errors import UserError

_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("mtime_ns", pa.int64()),
        ("bytes", pa.int64()),
        ("columns", pa.dictionary(pa.int32(), pa.string())),
    ]
)
Stamp = tuple[int, int]
"""A file's time in ns since 1970, and its size in bytes."""
_STAMPED = ("file", "mtime_ns", "bytes")
_WORTH_WRITING = 256
_READERS = 16


class Scan(NamedTuple):
    """SQL that reads many files, with a column `filename`, and the values to bind in it."""

    sql: str
    values: dict[str, list[str]]


class TableColumns:
    """The columns of a dataset's tables.

    DuckDB's `union_by_name` opens every file whenever a query is bound, and keeps 40 kB of memory for each until its
    end. Here a file is opened once, and again when its size or time has changed.
    """

    def __init__(self, dataset: DatasetDir) -> None:
        self._root, self._file = dataset.root, dataset.root / "manifest" / "columns.parquet"
        self._known = _read(self._file)
        self._num_read = 0

    def groups(self, paths: Sequence[Path], may_be_missing: bool = False) -> list[list[Path]]:
        """Splits files into groups with the same columns of the same types; in order.

        `may_be_missing` leaves out files that are not there.

        Raises:
            UserError: a file is not Parquet, or missing.
        """
        stamps = [_stamp(str(path), may_be_missing) for path in paths]
        paths = [path for path, stamp in zip(paths, stamps, strict=True) if stamp]
        columns = self._columns(paths, [stamp for stamp in stamps if stamp]).combine_chunks().dictionary_encode()
        codes = columns.indices.to_numpy()
        return [[paths[at] for at in np.flatnonzero(codes == code).tolist()] for code in range(len(columns.dictionary))]

    def scan(self, paths: Sequence[Path], name: str) -> Scan:
        """One SELECT of all rows of the files, of which there is at least one, by the columns' names.

        `name` begins the names of the values to bind. Raises as `groups` does.
        """
        listed = {f"{name}_{number}": list(map(str, group)) for number, group in enumerate(self.groups(paths))}
        each = (f"SELECT * FROM read_parquet(${bound}, filename = true)" for bound in listed)  # noqa: S608
        return Scan(" UNION ALL BY NAME ".join(each), listed)

    def save(self) -> None:
        """Remembers what was read, if it is much."""
        if self._num_read < _WORTH_WRITING:
            return
        self._num_read = 0
        with suppress(OSError, UserError), publish(self._file) as temporary:  # only a copy
            pq.write_table(self._known, temporary, compression="zstd")

    def _columns(self, paths: Sequence[Path], stamps: Sequence[Stamp]) -> pa.ChunkedArray:
        names = [str(path)[len(str(self._root)) + 1 :] for path in paths]
        times, sizes = np.array(stamps, np.int64).reshape(-1, 2).T.copy()
        stamped = pa.table([pa.array(names, pa.string()), pa.array(times), pa.array(sizes)], _STAMPED)
        places = self._places(stamped)
        unread = np.flatnonzero(places < 0)
        if len(unread):
            self._known = self._with(stamped.take(unread), _columns_of(paths[number] for number in unread.tolist()))
            self._num_read += len(unread)
            places = self._places(stamped)
        return self._known["columns"].take(places).cast(pa.string())

    def _places(self, stamped: pa.Table) -> NDArray[np.int64]:
        """The rows of what is known of the files as they are; -1 for others."""
        places = pc.index_in(stamped["file"], value_set=self._known["file"])
        found = self._known.take(pc.fill_null(places, 0)) if len(self._known) else None
        if found is None:
            return np.full(len(stamped), -1)
        is_same = [pc.equal(stamped[name], found[name]).to_numpy() for name in _STAMPED]
        same: NDArray[np.int64] = np.where(np.all(is_same, axis=0), pc.fill_null(places, -1).to_numpy(), -1)
        return same

    def _with(self, stamped: pa.Table, columns: Iterable[str]) -> pa.Table:
        former = pc.invert(pc.is_in(self._known["file"], value_set=stamped["file"]))
        read = stamped.append_column("columns", pa.array(columns, pa.string())).cast(_SCHEMA)
        return pa.concat_tables([self._known.filter(former), read]).unify_dictionaries().combine_chunks()


def _stamp(path: str, may_be_missing: bool) -> Stamp | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - a `Path` costs as much as the call
    except OSError as error:
        if may_be_missing:
            return None
        raise _unreadable(path, error) from error
    return status.st_mtime_ns, status.st_size


def _columns_of(paths: Iterable[Path]) -> Iterator[str]:
    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(_described, paths)


def schema_of(path: Path) -> pa.Schema:
    """The schema of a dataset's table; UserError if it is missing or damaged."""
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _described(path: Path) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema_of(path))


def _unreadable(path: Path | str, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read: {error}. Run the build again: it redoes damaged shards.")


def _read(path: Path) -> Any:
    try:
        return pq.read_table(path).cast(_SCHEMA).combine_chunks()
    except (OSError, ValueError, pa.ArrowException):  # damaged, or of another version
        return _SCHEMA.empty_table()
