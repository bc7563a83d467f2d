"""Finds the columns of images and captions in a Parquet file, and reads its images from front to back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.dataset.config import SourceConfig
from sdtrain.download.http.failures import FetchError
from sdtrain.download.source.captions import Captions, caption_rows
from sdtrain.errors import UserError

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes", "bytes")
_CAPTION_ROWS = 10_000
_IMAGES_AT_ONCE = 16


@dataclass(frozen=True)
class ImageTable:
    """A Parquet file with images: its number of rows, and the paths of the columns; `caption` is None without one."""

    num_rows: int
    image: str
    caption: str | None
    columns: tuple[str, ...]


def open_table(path: Path, source: SourceConfig, captions: Captions) -> ImageTable | None:
    """Reads a Parquet file's schema; None if no column holds the bytes of images, and the source names none.

    UserError if it is no Parquet, lacks a column that the source names, or could have its images in several.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    columns = tuple(schema.names)
    image = _image_column(path, schema, source.columns.get("image"))
    caption = captions.key(columns)
    if image and caption is None and (wanted := source.columns.get("caption")):
        raise UserError(f"{path} has no column {wanted} for captions. It has: {', '.join(columns)}.")
    return ImageTable(num_rows, image, caption, columns) if image else None


def _image_column(path: Path, schema: pa.Schema, wanted: str | None) -> str | None:
    found = {name: inner for name in schema.names if (inner := _bytes_in(name, schema.field(name).type))}
    if wanted is not None:
        if wanted not in found:
            raise UserError(
                f"{path} has no column {wanted} with the bytes of images (binary, or a struct of bytes and path). "
                f"It has: {', '.join(f'{field.name} ({field.type})' for field in schema)}."
            )
        return found[wanted]
    usual = [name for known in _IMAGE_NAMES for name in found if name.lower() == known]
    structs = [name for name, inner in found.items() if inner != name]
    candidates = usual[:1] or structs
    if len(candidates) > 1:
        raise UserError(
            f"{path} has several columns of images: {', '.join(structs)}. Choose one: --columns image=NAME."
        )
    return found[candidates[0]] if candidates else None


def _bytes_in(name: str, kind: pa.DataType) -> str | None:
    """The path of the bytes in a column: Hugging Face's images are a struct of `bytes` and `path`."""
    if pa.types.is_struct(kind):
        return f"{name}.bytes" if any(field.name == "bytes" and _is_binary(field.type) for field in kind) else None
    return name if _is_binary(kind) else None


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def read_captions(path: Path, table: ImageTable, captions: Captions) -> Iterator[str | None]:
    """The caption of each row; UserError if the file is damaged."""
    if table.caption is None:
        yield from (None for _ in range(table.num_rows))
        return
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_CAPTION_ROWS, columns=[table.caption]):
                yield from caption_rows(batch, captions, path.name)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


class TableImages:
    """The images of a Parquet file by their row, best in ascending order.

    In memory are some pages of the file, a row group's at most (Hugging Face writes groups of 100 images), and a few
    images.
    """

    def __init__(self, path: Path, column: str) -> None:
        # No buffering ahead: a group of rows may hold gigabytes of images.
        self._file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
        self._column = column
        sizes = [self._file.metadata.row_group(n).num_rows for n in range(self._file.num_row_groups)]
        self._begins = [0, *accumulate(sizes)]
        self._group = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._first, self._rows = 0, list[Any]()

    def __call__(self, row: int) -> bytes:
        """The bytes of one row; FetchError if there are none."""
        if not 0 <= row < self._begins[-1]:
            raise FetchError("source_changed", "the table has fewer rows now")
        if row < self._first or row >= self._begins[self._group + 1]:
            self._open(next(n for n, end in enumerate(self._begins[1:]) if row < end))
        while row >= self._first + len(self._rows):
            self._advance()
        value = self._rows[row - self._first]
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            raise FetchError("source_missing", "the row holds no bytes of an image")
        return bytes(content)

    def close(self) -> None:
        """Closes the file."""
        self._batches = iter(())
        self._file.close()

    def _open(self, group: int) -> None:
        self._group, self._first, self._rows = group, self._begins[group], []
        self._batches = self._file.iter_batches(_IMAGES_AT_ONCE, [group], [self._column])

    def _advance(self) -> None:
        batch = next(self._batches, None)
        if batch is None:
            raise FetchError("source_unreadable", "the table has fewer rows than it says")
        self._first += len(self._rows)
        self._rows = batch.column(0).to_pylist()
