"""A user's own columns, carried from the metadata into the selection: their type, and the SQL that gives it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import duckdb

_WHOLE = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER")
_NUMBER = r"-?(0|[1-9][0-9]*)([.][0-9]+)?([eE][-+]?[0-9]+)?"
_EXACT = 2**53
"""Above it a whole number may change as a DOUBLE."""


def kind_of(file_type: str) -> str:
    """Returns the type in our tables of a Parquet column: BOOLEAN, BIGINT, DOUBLE or, for all others, VARCHAR."""
    if file_type in ("BOOLEAN", *_WHOLE):
        return "BOOLEAN" if file_type == "BOOLEAN" else "BIGINT"
    return "DOUBLE" if file_type in ("FLOAT", "DOUBLE") or file_type.startswith("DECIMAL") else "VARCHAR"


def common_kind(kinds: Iterable[str | None]) -> str:
    """Returns the type that holds the values of several files; None stands for a file without any."""
    found = {kind for kind in kinds if kind}
    if found == {"BIGINT", "DOUBLE"}:
        return "DOUBLE"
    return found.pop() if len(found) == 1 else "VARCHAR"


def kinds_of_text(
    connection: duckdb.DuckDBPyConnection, rows: str, values: Sequence[object], names: Sequence[str]
) -> dict[str, str | None]:
    """Returns the types of columns of text in `rows` (a SELECT of them), by all their values; None without any.

    Whole numbers must be written as they are printed: 007 stays text, and so does a number that DOUBLE cannot hold.
    """
    items = ", ".join(_counts(f'"{name}"') for name in names)
    counts = connection.execute(f"SELECT {items} FROM ({rows})", list(values)).fetchall()[0]  # noqa: S608
    return {name: _kind(*counts[4 * number : 4 * number + 4]) for number, name in enumerate(names)}


def _counts(column: str) -> str:
    number = f"TRY_CAST({column} AS DOUBLE)"
    tests = (
        f"lower({column}) IN ('true', 'false')",
        f"TRY_CAST({column} AS BIGINT)::VARCHAR = {column}",
        f"regexp_full_match({column}, '{_NUMBER}') AND isfinite({number}) "
        f"AND (abs({number}) <= {_EXACT} OR NOT regexp_full_match({column}, '-?[0-9]+'))",
    )
    return ", ".join([f"count({column})", *(f"count_if({test})" for test in tests)])


def _kind(num: int, num_truths: int, num_whole: int, num_numbers: int) -> str | None:
    if not num:
        return None
    kinds = {"BOOLEAN": num_truths, "BIGINT": num_whole, "DOUBLE": num_numbers}
    return next((kind for kind, count in kinds.items() if count == num), "VARCHAR")


def carried_sql(column: str, file_type: str, kind: str) -> str:
    """Returns SQL for a file's column (quoted) as the type `kind`; NaN and infinity, which JSON lacks, are NULL."""
    if kind == "DOUBLE":
        return f"CASE WHEN isfinite(TRY_CAST({column} AS DOUBLE)) THEN TRY_CAST({column} AS DOUBLE) END"
    if kind == "VARCHAR" and file_type == "BLOB":
        return f"TRY(decode({column}))"
    return column if file_type == kind else f"TRY_CAST({column} AS {kind})"
