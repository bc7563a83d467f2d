"""Reads prompts from text files and tables, and seeds from ranges."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sdtrain.errors import UserError

COLUMN = "prompt"
"""The column of a table that is read unless another is named."""
_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_MAX_SEEDS = 1_000_000


def read_prompts(path: Path, column: str | None = None) -> list[str]:
    """Reads the prompts of a file, without empty ones.

    A text file has one a line. Lines end with a line feed, a carriage return or both: other characters that Python
    takes for line ends (U+2028, U+0085, form feeds) are part of a prompt. `.csv`, `.tsv`, `.jsonl` and `.parquet` are
    tables with a header, of which `column` is read, by default `prompt`. Text is UTF-8, or UTF-16 with a byte-order
    mark; either may end in `.gz`. UserError if the file cannot be read as such or holds no prompt.
    """
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    read = _TABLES.get(kind.lower())
    try:
        if read is None and column is not None:
            raise UserError(f"{path} is text with one prompt a line and has no column '{column}'.")
        found = _lines(_text(path)) if read is None else read(path, column or COLUMN)
        prompts = [prompt for line in found if (prompt := line.strip())]
    except (OSError, EOFError, UnicodeError, ValueError, csv.Error) as error:
        what = "UTF-8 or UTF-16 text with one prompt a line" if read is None else f"a table ({kind.lower()})"
        raise UserError(f"{path} cannot be read as {what}: {error}") from error
    if not prompts:
        raise UserError(f"{path} holds no prompt. Write one a line.")
    return prompts


def parse_seeds(text: str) -> list[int]:
    """Seeds from ranges and single ones, as in 0-15 or 3,7,10-12; UserError for anything else, or one named twice."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last - first >= _MAX_SEEDS:
            raise UserError(f"--seeds '{text}': write ranges and numbers with commas between, as in 0-15 or 3,7,10-12.")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds '{text}' names a seed twice.")
    return seeds


def _text(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    return content.decode(encoding)


def _lines(text: str) -> list[str]:
    return re.split("\r\n|\n|\r", text)


def _delimited(delimiter: str) -> Callable[[Path, str], Iterable[str]]:
    def read(path: Path, column: str) -> Iterator[str]:
        text = _text(path)
        header = _lines(text)[0]
        used = ";" if delimiter == "," and ";" in header and "," not in header else delimiter
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=used)
        return _column(rows, column, rows.fieldnames or [], path)

    return read


def _json_lines(path: Path, column: str) -> Iterator[str]:
    rows = [json.loads(line) for line in _lines(_text(path)) if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} has lines that are no JSON objects; each needs a '{column}'.")
    return _column(rows, column, sorted({name for row in rows for name in row}), path)


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow.parquet as pq  # late: few need it, and commands start sooner without it

    names = pq.read_schema(path).names
    rows = pq.read_table(path, columns=[column]).to_pylist() if column in names else []
    return _column(rows, column, names, path)


def _column(rows: Iterable[Mapping[str, Any]], column: str, names: Iterable[str], path: Path) -> Iterator[str]:
    if column not in names:
        raise UserError(
            f"{path} has no column '{column}' but: {', '.join(names)}. Name the prompts' with --prompt-column."
        )
    return (str(row[column]) for row in rows if row.get(column) is not None)


_TABLES: Mapping[str, Callable[[Path, str], Iterable[str]]] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
}
