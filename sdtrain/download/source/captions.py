"""Reads captions: files beside images, JSON, and tables such as Hugging Face's metadata.jsonl."""

from __future__ import annotations

import codecs
import csv
import io
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.dataset.config import SourceConfig
from sdtrain.download.source.walk import Skipped
from sdtrain.errors import UserError

TEXT_SUFFIXES = ("txt", "caption", "text")
CAPTION_NAMES = ("caption", "text", "captions", "prompt", "alt_text", "alt", "description", "title")
"""Usual names of a caption's column or JSON key, in any case; the first present wins."""
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_FILE_NAMES = ("file_name", "image_file_name", "filename")
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_MAX_BYTES = 2**20
_BATCH_ROWS = 1_000


class Captions:
    """Reads captions with the settings of one source; what cannot be read is counted by name, and gives None."""

    def __init__(self, source: SourceConfig, skipped: Skipped) -> None:
        self._source, self._skipped = source, skipped

    def parse(self, body: bytes, suffix: str, name: str) -> str | None:
        """The caption in a file's content, by its suffix in lower case: text, or JSON with a caption's key."""
        text = self._decoded(body, name)
        if text is None or suffix != "json":
            return text.strip() if text is not None else None
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            self._skipped.add("JSON that cannot be read, taken for no caption", name)
            return None
        return self.of(content, name) if isinstance(content, dict) else None

    def read(self, path: Path, name: str) -> str | None:
        """The caption in a file."""
        try:
            with path.open("rb") as file:
                body = file.read(_MAX_BYTES + 1)
        except OSError:
            self._skipped.add("captions that cannot be read", name)
            return None
        return self.parse(body, path.suffix[1:].lower(), name)

    def of(self, content: Mapping[str, Any], name: str) -> str | None:
        """The caption in a row or a JSON object, in the file or row `name`: the first of a list."""
        key = self.key(list(content))
        value = content[key] if key is not None else None
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            value = next((item for item in value if isinstance(item, str) and item.strip()), None)
        if isinstance(value, bytes):
            value = self._decoded(value, name)
        return value.strip() if isinstance(value, str) else None

    def key(self, names: Sequence[str]) -> str | None:
        """The caption's among the names of columns or keys, if any."""
        if wanted := self._source.columns.get("caption"):
            return wanted if wanted in names else None
        return _first(CAPTION_NAMES, names)

    def rows(self, path: Path, folder: str, name: str) -> Iterator[tuple[str, str]]:
        """The files, relative to the source, and their captions in a metadata file of a folder.

        UserError if it cannot be read at all.
        """
        for row in self._rows(path, name):
            key = _first(_FILE_NAMES, list(row))
            if key is None or self.key(list(row)) is None:
                shown = f"{name}: {', '.join(map(str, row))}"
                self._skipped.add("rows of metadata without file_name and a caption (--columns caption=NAME)", shown)
                continue
            caption, file = self.of(row, name), posixpath.normpath(posixpath.join(folder, str(row[key])))
            if file.startswith(("../", "/")):
                self._skipped.add("files named by metadata that lie outside the source", f"{name}: {file}")
            elif caption is not None:
                yield file, caption

    def _rows(self, path: Path, name: str) -> Iterator[dict[str, Any]]:
        if path.suffix == ".parquet":
            yield from _table_rows(path, self)
            return
        with path.open("rb") as file:
            encoding = _encoding(file.read(4)) or self._source.encoding
        with path.open(encoding=encoding, newline="") as lines:
            try:
                yield from csv.DictReader(lines) if path.suffix == ".csv" else self._objects(lines, name)
            except (UnicodeDecodeError, csv.Error) as error:
                raise UserError(
                    f"{path} cannot be read as {encoding} ({error}). Save it in UTF-8, or name its encoding with "
                    "--encoding."
                ) from error

    def _objects(self, lines: io.TextIOBase, name: str) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                content = None
            if isinstance(content, dict):
                yield content
            else:
                self._skipped.add("lines of metadata that are no JSON object", f"{name}, line {number}")

    def _decoded(self, body: bytes, name: str) -> str | None:
        if len(body) > _MAX_BYTES:
            self._skipped.add("captions of more than 1 MiB, taken for none", name)
            return None
        encoding = _encoding(body) or self._source.encoding
        try:
            return body.decode(encoding)
        except UnicodeDecodeError:
            self.skip_undecodable(name, encoding)
            return None

    def skip_undecodable(self, name: str, encoding: str = "utf-8") -> None:
        """Counts a caption that is not in its encoding."""
        self._skipped.add(f"captions that are not {encoding}, taken for none (--encoding names another)", name)


def _table_rows(path: Path, captions: Captions) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in (_first(_FILE_NAMES, names), captions.key(names)) if name is not None]
            for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def caption_rows(batch: pa.RecordBatch, captions: Captions, name: str) -> Iterator[str | None]:
    """The captions of a batch of rows of the table `name`, whose text may be anything."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:  # Arrow does not check text that it reads
        if len(batch) > 1:
            for number in range(len(batch)):
                yield from caption_rows(batch.slice(number, 1), captions, name)
        else:
            captions.skip_undecodable(name)
            yield None
        return
    for row in rows:
        yield captions.of(row, name)


def names_files(path: Path) -> bool:
    """Whether a Parquet file has captions of files beside it, rather than images."""
    try:
        return _first(_FILE_NAMES, pq.read_schema(path).names) is not None
    except (pa.ArrowException, OSError):
        return False


def _encoding(body: bytes) -> str | None:
    return next((encoding for mark, encoding in _MARKS if body.startswith(mark)), None)


def _first(wanted: Sequence[str], names: Sequence[str]) -> str | None:
    by_lower = {str(name).lower(): name for name in reversed(names)}
    return next((by_lower[name] for name in wanted if name in by_lower), None)
