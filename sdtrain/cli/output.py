"""Rows in the terminal and in files: tables, CSV, JSON, Parquet."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from sdtrain.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_ROWS_SHOWN = 100
_WIDEST = 10_000


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
"""For commands whose output is data."""


def print_json(document: object) -> None:
    """Prints one JSON document, in one line; paths and dates become text, and numbers that JSON lacks (NaN) null."""
    print(_as_json(document))


def prints_to_stderr(is_so: bool) -> AbstractContextManager[object]:
    """Within the block, what we and libraries print goes to standard error, so that a JSON document stays alone."""
    return redirect_stdout(sys.stderr) if is_so else nullcontext()


def _as_json(value: object) -> str:
    try:
        return json.dumps(value, default=_text, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), default=_text, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Form(StrEnum):
    """The format of an answer."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


def form_of(output: Path | None) -> Form:
    """The format by a file's suffix, or a terminal table without a file; UserError for an unknown suffix."""
    if output is None:
        return Form.table
    suffix = output.suffix.lstrip(".").replace("jsonl", "json")
    if suffix not in (Form.csv, Form.json, Form.parquet):
        raise UserError(f"What should {output} hold? End its name in .csv, .json or .parquet, or give --format.")
    return Form(suffix)


def show(answer: pa.RecordBatchReader, form: Form) -> None:
    """Prints an answer's first rows as a table, or all of it as text; UserError for other formats."""
    if form == Form.parquet:
        raise UserError("Parquet is no text: name a file for it with --output.")
    if form == Form.table:
        print_table(_first(answer))
    else:
        _write_text(answer, sys.stdout, form)


def save(answer: pa.RecordBatchReader, target: Path, form: Form) -> int:
    """Writes an answer atomically (JSON: one object per line); returns its rows' number. UserError if it fails."""
    from sdtrain.dataset.files import publish

    if form == Form.table:
        raise UserError(f"A table is for the terminal: write csv, json or parquet to {target}.")
    try:
        with publish(target) as temporary:
            return _write(answer, temporary, form)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}.") from error


def _write(answer: pa.RecordBatchReader, path: Path, form: Form) -> int:
    if form == Form.parquet:
        import pyarrow.parquet as pq

        with pq.ParquetWriter(path, answer.schema, compression="zstd") as writer:
            return sum(_written(writer, batch) for batch in answer)
    with path.open("w", newline="") as file:
        return _write_text(answer, file, form)


def _write_text(answer: pa.RecordBatchReader, file: IO[str], form: Form) -> int:
    write: Callable[[dict[str, Any]], Any]
    if form == Form.csv:
        table = csv.writer(file)
        table.writerow(answer.schema.names)
        write = lambda row: table.writerow(_text(value) for value in row.values())  # noqa: E731
    else:
        write = lambda row: file.write(_as_json(row) + "\n")  # noqa: E731
    num_rows = 0
    for batch in answer:
        for row in batch.to_pylist():
            write(row)
        num_rows += len(batch)
    return num_rows


def save_rows(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Writes rows with equal keys as CSV; an empty file if there are none."""
    from sdtrain.dataset.files import publish

    with publish(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.writer(file)
        for number, row in enumerate(rows):
            if not number:
                table.writerow(row)
            table.writerow(_text(value) for value in row.values())


def _written(writer: pq.ParquetWriter, batch: pa.RecordBatch) -> int:
    writer.write_batch(batch)
    return len(batch)


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _first(answer: pa.RecordBatchReader) -> list[dict[str, object]]:
    """The rows that fit a terminal."""
    batch = next(iter(answer), None)
    rows: list[dict[str, object]] = batch.slice(0, _ROWS_SHOWN).to_pylist() if batch is not None else []
    if batch is not None and len(batch) > _ROWS_SHOWN:
        print(f"The first {_ROWS_SHOWN} rows; --format csv, json or an --output file gives all.", file=sys.stderr)
    return rows


def print_table(rows: list[dict[str, object]]) -> None:
    """Prints rows with equal keys; where no terminal limits the width, as in a pipe, nothing is cut."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(box=None)
    for name in rows[0] if rows else ():
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
    console = Console()
    if not console.is_terminal:
        widest = console.options.update(max_width=_WIDEST)
        console.width = max(console.width, Measurement.get(console, widest, table).maximum)
    console.print(table)
