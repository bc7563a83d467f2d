"""Groups Parquet files by their columns; footers are read once and remembered beside the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

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
_WORTH_WRITING = 256
_READERS = 16


class TableColumns:
    """The columns of a dataset's tables.

    DuckDB's `union_by_name` opens every file whenever a view is bound. Here a file is opened once, and again when its
    size or time has changed.
    """

    def __init__(self, dataset: DatasetDir) -> None:
        self._root, self._file = dataset.root, dataset.root / "manifest" / "columns.parquet"
        self._known = _read(self._file)
        self._num_read = 0

    def groups(self, paths: Sequence[Path]) -> list[list[Path]]:
        """Splits files into groups with the same columns of the same types; in order.

        Raises:
            UserError: a file is not Parquet.
        """
        stamps = [_stamp(path) for path in paths]
        unread = [path for path, stamp in zip(paths, stamps, strict=True) if self._columns(path, stamp) is None]
        with ThreadPoolExecutor(_READERS) as pool:
            read = dict(zip(unread, pool.map(_columns_of, unread), strict=True))
        found: dict[str, list[Path]] = {}
        for path, stamp in zip(paths, stamps, strict=True):
            columns = read.get(path) or self._columns(path, stamp) or ""
            self._known[self._name(path)] = stamp, columns
            found.setdefault(columns, []).append(path)
        self._num_read += len(read)
        return list(found.values())

    def save(self) -> None:
        """Remembers what was read, if it is much."""
        if self._num_read < _WORTH_WRITING:
            return
        rows = [(name, *stamp, columns) for name, (stamp, columns) in self._known.items()]
        table = pa.Table.from_arrays([pa.array(column) for column in zip(*rows, strict=True)], _SCHEMA.names)
        with suppress(OSError, UserError), publish(self._file) as temporary:  # only a copy
            pq.write_table(table.cast(_SCHEMA), temporary, compression="zstd")

    def _columns(self, path: Path, stamp: tuple[int, int]) -> str | None:
        known = self._known.get(self._name(path))
        return known[1] if known and known[0] == stamp else None

    def _name(self, path: Path) -> str:
        return str(path)[len(str(self._root)) + 1 :]


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _columns_of(path: Path) -> str:
    try:
        return ", ".join(f"{field.name} {field.type}" for field in pq.read_schema(path))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}. Run the build again: it redoes damaged shards.") from error


def _read(path: Path) -> dict[str, tuple[tuple[int, int], str]]:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException):
        return {}
    if table.schema.names != _SCHEMA.names:
        return {}
    names, times, sizes, columns = (column.to_pylist() for column in table.columns)
    return dict(zip(names, zip(zip(times, sizes, strict=True), columns, strict=True), strict=True))
