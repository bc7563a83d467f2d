"""Metadata in CSV, TSV and JSON lines: their columns, their SQL and their identity."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from filters.select.faults import fault
from filters.select.httpfs import is_remote, load_remote
from filters.select.locations import COMPRESSIONS, ends_with, is_parquet
from sdtrain.errors import UserError
from sdtrain.redaction import without_secrets

NESTED = "NESTED"
_SEPARATORS = (",", "\t", ";", "|")
_LINES_LOOKED_AT = 1000
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# One column of whole lines; JSON has no line break within a value.
_LINES = (
    "read_csv(?, auto_detect = false, header = false, delim = '', quote = '', escape = '', strict_mode = false, "
    "compression = '{compression}', columns = {{'line': 'VARCHAR'}})"
)
_CSV = (
    "read_csv(?, auto_detect = false, header = true, delim = {separator}, quote = '\"', escape = '\"', "
    "strict_mode = true, compression = '{compression}', columns = {{{columns}}})"
)


@dataclass(frozen=True)
class TextFormat:
    """The form of a file: `separator` of its values (None: JSON lines) and `compression` by DuckDB's name."""

    separator: str | None
    compression: str


def is_text(path: str) -> bool:
    """Returns whether a file is read as text: by the ending of its name, else by its first bytes if it is local."""
    if is_parquet(path):
        return False
    if _kind(path) or is_remote(path):
        return _kind(path) is not None
    with Path(path).open("rb") as file:
        return file.read(4) != b"PAR1"


def describe_text(
    connection: duckdb.DuckDBPyConnection, path: str
) -> tuple[TextFormat, dict[str, str], tuple[str, int, str]]:
    """Returns a file's format, its columns' types (`NESTED` or VARCHAR, whatever they hold) and its identity.

    The separator is the one of comma, tab, semicolon and bar that the first line, with the columns' names, has most of.
    Columns of JSON lines are those of the first 1,000. UserError with the line if there are no names or objects.
    """
    _refuse_utf_16(path)
    compression = next((name for ending, name in COMPRESSIONS.items() if ends_with(path, (ending,))), "none")
    lines = list(_lines(connection, path, compression))
    kind = _kind(path) or (".jsonl" if lines and lines[0].lstrip().startswith("{") else ".csv")
    if kind in (".jsonl", ".ndjson"):
        return TextFormat(None, compression), _types_of_objects(path, lines), _identity(path)
    separator = _separator(lines[0], "\t" if kind == ".tsv" else ",") if lines else ","
    return TextFormat(separator, compression), _types_of_header(path, lines, separator), _identity(path)


def text_sql(form: TextFormat, all_columns: Sequence[str], wanted: Iterable[str]) -> str:
    """Returns what to read FROM, with a ? for a list of files: a table of text, at least with the columns `wanted`."""
    if form.separator is not None:
        columns = ", ".join(f"{_literal(name)}: 'VARCHAR'" for name in all_columns)
        return _CSV.format(separator=_literal(form.separator), compression=form.compression, columns=columns)
    names = list(dict.fromkeys(wanted))
    paths = ", ".join(_literal(f'$."{name}"') for name in names)
    items = ", ".join(f'found[{number}] AS "{name}"' for number, name in enumerate(names, start=1))
    lines = f"SELECT json_extract_string(line, [{paths}]) AS found FROM {_LINES} WHERE trim(line) <> ''"  # noqa: S608
    return f"(SELECT {items} FROM ({lines.format(compression=form.compression)}))"  # noqa: S608


def first_bad_line(connection: duckdb.DuckDBPyConnection, path: str, form: TextFormat) -> str | None:
    """Returns the place of the first line that is not JSON, if the file has one."""
    lines = _LINES.format(compression=form.compression)
    query = (
        f"SELECT number FROM (SELECT line, row_number() OVER () AS number FROM {lines}) "  # noqa: S608
        "WHERE trim(line) <> '' AND NOT json_valid(line) LIMIT 1"
    )
    found = connection.execute(query, [path]).fetchall()
    return f"{path}, line {found[0][0]}: not a JSON object" if found else None


def _kind(path: str) -> str | None:
    name = without_secrets(path).lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((kind for kind in (".csv", ".tsv", ".jsonl", ".ndjson") if name.endswith(kind)), None)


def _refuse_utf_16(path: str) -> None:
    if is_remote(path):
        return  # the reader says that it is not UTF-8
    compression = next((name for ending, name in COMPRESSIONS.items() if ends_with(path, (ending,))), None)
    try:
        with pa.input_stream(path, compression=compression) as file:
            head = file.read(2)
    except OSError as error:
        raise UserError(f"{path} cannot be read as {compression}: {error}") from error
    if head in _UTF_16:
        raise UserError(f"{path} is UTF-16. Convert it: iconv -f UTF-16 -t UTF-8.")


def _lines(connection: duckdb.DuckDBPyConnection, path: str, compression: str) -> Iterator[str]:
    query = f"SELECT line FROM {_LINES.format(compression=compression)} LIMIT {_LINES_LOOKED_AT}"  # noqa: S608
    try:
        found: list[tuple[Any]] = connection.execute(query, [path]).fetchall()
    except duckdb.Error as error:
        raise UserError(f"{path} cannot be read as text: {fault(error)}") from error
    return (line or "" for (line,) in found)


def _separator(header: str, usual: str) -> str:
    counts = {separator: len(_values(header, separator)) for separator in (usual, *_SEPARATORS)}
    return max(counts, key=counts.__getitem__)


def _values(header: str, separator: str) -> list[str]:
    return [value.strip() for value in next(csv.reader([header], delimiter=separator), [])]


def _types_of_header(path: str, lines: Sequence[str], separator: str) -> dict[str, str]:
    names = _values(lines[0], separator) if lines else []
    if any("://" in name for name in names):
        raise UserError(
            f"{path}, line 1: a row, where the names of the columns are expected. Put a line with them before it, "
            "such as url,caption."
        )
    types = dict[str, str]()
    for number, name in enumerate(names):
        # pandas leaves the name of its index empty.
        if types.setdefault(name or f"column{number}", "VARCHAR") and names.count(name) > 1 and name:
            raise UserError(f"{path}, line 1: there are two columns {name}.")
    return types


def _types_of_objects(path: str, lines: Sequence[str]) -> dict[str, str]:
    types = dict[str, str]()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(content, dict):
            raise UserError(f'{path}, line {number}: not an object. Write one {{"url": ...}} on each line.')
        for name, value in content.items():
            if '"' in name or "\\" in name:
                continue  # no recipe needs such a column
            is_nested = isinstance(value, dict | list) or types.get(name) == NESTED
            types[name] = NESTED if is_nested else "VARCHAR"
    return types


def _identity(path: str) -> tuple[str, int, str]:
    name = without_secrets(path).rpartition("/")[2]
    if not is_remote(path):
        status = Path(path).stat()
        return name, status.st_size, _digest(path, status.st_size, status.st_mtime_ns)
    with closing(duckdb.connect()) as connection:
        load_remote(connection)
        # Neither column fetches the content.
        query = "SELECT size, epoch_us(last_modified) FROM read_blob(?)"
        ((size, changed),) = connection.execute(query, [path]).fetchall()
    return name, int(size), f"changed {changed}"


@lru_cache(maxsize=4096)
def _digest(path: str, size: int, changed_ns: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
