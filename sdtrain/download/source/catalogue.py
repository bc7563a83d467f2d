"""The list of a source's images: Parquet that SELECT reads as metadata, with the place of each image's bytes.

An image's URL is `import://NAME/path`, with `#member` for one in a tar and `#row` for one in a Parquet file, counted
from 0. The URL and the caption give the uid, as everywhere (`sdtrain.dataset.uid`): it depends neither on where the
source lies nor on what else is in it, and a file under two names is two images with one sha256.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.dataset.addresses import IMPORT
from sdtrain.dataset.files import numbered_files
from sdtrain.errors import UserError

ROWS_PER_GROUP = 10_000
PLACE = pa.schema(
    [
        ("source_file", pa.string()),  # relative to the source, escaped
        ("source_bytes", pa.int64()),  # of that file; NULL for a tar, which may grow
        ("member_offset", pa.int64()),  # in a tar
        ("member_bytes", pa.int64()),
        ("table_row", pa.int64()),  # in a Parquet file
        ("table_column", pa.string()),
    ]
)
SCHEMA = pa.schema([("url", pa.string()), ("caption", pa.string()), ("sdtrain_source_row", pa.int64()), *PLACE])
_REMARKS = b"sdtrain.import"
_ESCAPED = "%#? \t\r\n"


@dataclass(frozen=True)
class Place:
    """Where an image's bytes are; fields as the columns `PLACE`."""

    source_file: str
    source_bytes: int | None = None
    member_offset: int | None = None
    member_bytes: int | None = None
    table_row: int | None = None
    table_column: str | None = None


def escape(name: str) -> str:
    """A file's name for a URL: %, #, ?, blanks, control characters and bytes that are no UTF-8 become %XX."""
    if name.isascii() and name.isprintable() and not any(char in name for char in _ESCAPED):
        return name
    return "".join(map(_escaped, name))


def unescape(text: str) -> str:
    """The file's name that `escape` was given."""
    return os.fsdecode(unquote_to_bytes(text)) if "%" in text else text


def _escaped(char: str) -> str:
    return char if char.isprintable() and char not in _ESCAPED else quote_from_bytes(os.fsencode(char), safe="")


def url_of(name: str, file: str, fragment: str = "") -> str:
    """The URL of an image in an escaped `file` of the source `name`."""
    return f"{IMPORT}{name}/{file}{'#' if fragment else ''}{fragment}"


def catalogue_files(folder: Path) -> list[Path]:
    """A dataset's catalogues, in the order of the imports."""
    return list(numbered_files(folder, ".parquet").values())


def write_catalogue(path: Path, batches: Iterable[pa.RecordBatch], first_row: int, remarks: Sequence[str]) -> int:
    """Writes a catalogue of `batches`, all columns of `SCHEMA` but the number of the row; returns its rows.

    Equal rows give equal bytes, however they are batched.
    """
    schema = SCHEMA.with_metadata({_REMARKS: json.dumps(list(remarks)).encode()})
    waiting, num_rows = pa.table({}, schema=None), 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:

        def write(rows: pa.Table) -> None:
            nonlocal num_rows
            numbers = pa.array(range(first_row + num_rows, first_row + num_rows + len(rows)), pa.int64())
            numbered = rows.append_column("sdtrain_source_row", numbers).select(SCHEMA.names).cast(schema)
            writer.write_table(numbered, ROWS_PER_GROUP)
            num_rows += len(rows)

        for batch in batches:
            new = pa.Table.from_batches([batch])
            waiting = pa.concat_tables([waiting, new]) if len(waiting) else new
            while len(waiting) >= ROWS_PER_GROUP:
                write(waiting.slice(0, ROWS_PER_GROUP).combine_chunks())
                waiting = waiting.slice(ROWS_PER_GROUP)
        if len(waiting):
            write(waiting.combine_chunks())
    return num_rows


def last_source_row(path: Path) -> int:
    """The number of a catalogue's last row."""
    with pq.ParquetFile(path) as file:
        group = file.read_row_group(file.num_row_groups - 1, ["sdtrain_source_row"])
        return int(group.column(0)[-1].as_py())


def read_remarks(path: Path) -> list[str]:
    """What was said of the source when the catalogue was made; nothing of a file that is no catalogue."""
    described = pq.read_schema(path).metadata or {}
    return [str(remark) for remark in json.loads(described.get(_REMARKS, b"[]"))]


class Catalogue:
    """Looks up places by the number of the row, cheaply where the numbers ascend; for one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self._paths = catalogue_files(folder)
        counts = [pq.read_metadata(path).num_rows for path in self._paths]
        self._firsts = [0, *accumulate(counts)]
        self._loaded: tuple[int, int] = (-1, -1)
        self._rows: list[dict[str, Any]] = []

    def place(self, source_row: int, url: str) -> Place:
        """The place of the image with this number and URL; UserError if the catalogues have it not."""
        number = bisect_right(self._firsts, source_row) - 1
        if 0 <= number < len(self._paths):
            group, position = divmod(source_row - self._firsts[number], ROWS_PER_GROUP)
            row = self._group(number, group)[position]
            if row["url"] == url:
                return Place(**{name: row[name] for name in PLACE.names})
        raise UserError(
            f"The list of imported images in {self._paths[0].parent if self._paths else 'import/'} does not have "
            f"{url}. Were its files changed? Import the source again into another output."
        )

    def _group(self, number: int, group: int) -> list[dict[str, Any]]:
        if self._loaded != (number, group):
            with pq.ParquetFile(self._paths[number]) as file:
                self._rows = file.read_row_group(group, ["url", *PLACE.names]).to_pylist()
            self._loaded = number, group
        return self._rows
