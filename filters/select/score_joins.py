"""Joins of score files onto the metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb

from filters.columns import ALIASES
from filters.select.faults import fault
from filters.select.locations import PARQUET, TEXT_SUFFIXES, find_files, without_texts_beside_parquet
from filters.select.metadata_files import describe_files, prepare
from filters.select.schema import MetadataFile, check_hashes, normalised_sql, turn_sizes
from filters.select.sql_functions import URL_CAPTION, Lookup, lookup_sql
from filters.select_config import JOINABLE, JoinConfig
from sdtrain.errors import UserError
from sdtrain.redaction import without_secrets

_KEYS = {"hash": "hash", "url_caption": URL_CAPTION}


@dataclass(frozen=True)
class Joins:
    """Score files in tables of a connection: each table's join key, and the columns that it supplies (`filled`)."""

    keys: tuple[str, ...] = ()
    filled: tuple[tuple[str, ...], ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def columns(self) -> frozenset[str]:
        """Columns that joins may fill, so conditions on the metadata's own values must not be pushed down."""
        return frozenset(column for columns in self.filled for column in columns)

    def sql(self, rows: str) -> str:
        """Fills NULLs in `rows` (a SELECT of our columns) from the score files."""
        if not self.keys:
            return rows
        sources = {column: [f"r.{column}"] for column in ALIASES if column in self.columns}
        for number, columns in enumerate(self.filled):
            for column in columns:
                sources[column].append(f"j{number}.{column}")
        replaced = ", ".join(f"coalesce({', '.join(values)}) AS {column}" for column, values in sources.items())
        lookups = [Lookup(_table(number), f"j{number}", _KEYS[key]) for number, key in enumerate(self.keys)]
        return lookup_sql(rows, lookups, f" REPLACE ({replaced})")


def load_joins(connection: duckdb.DuckDBPyConnection, joins: Sequence[JoinConfig]) -> Joins:
    """Reads a recipe's score files into tables of `connection`, one row per key.

    Joins keyed by hash need `laion_hash` (`filters.select.sql_functions.register_laion_hash`). UserError if files are
    missing, unreadable, or lack a column that the join needs.
    """
    filled, remarks = [], list[str]()
    for number, join in enumerate(joins):
        files = join_files(join)
        columns = columns_of(join, files)
        if join.by == "hash":
            check_hashes(connection, files)
        prepare(connection, (file.path for file in files))
        try:
            num_rows, num_more = _load(connection, number, join, files, columns)
        except duckdb.Error as error:
            raise UserError(f"The score files {join.files} cannot be read: {fault(error)}") from error
        remarks.append(_remark(join, columns, num_rows, num_more))
        filled.append(columns)
    return Joins(tuple(join.by for join in joins), tuple(filled), tuple(remarks))


def join_files(join: JoinConfig) -> list[MetadataFile]:
    """Returns a join's score files; raises `UserError` if there are none or one cannot be read."""
    paths = find_files(join.files, "score files (select.joins)", (PARQUET, *TEXT_SUFFIXES))
    return turn_sizes(describe_files(without_texts_beside_parquet(join.files, paths)), "auto")


def columns_of(join: JoinConfig, files: Sequence[MetadataFile]) -> tuple[str, ...]:
    """Returns our names of the columns that a join supplies; raises `UserError` if its key or a column is missing."""
    for file in files:
        needed = {"url", "caption"} - set(file.columns)
        if needed and not (join.by == "hash" and "hash" in file.columns):
            raise UserError(
                f"{file.path} cannot be joined by {join.by}: it has no column "
                f"{' or '.join(sorted(needed))}. It has: {', '.join(file.all_columns)}."
            )
    there = {column for file in files for column in file.columns} & JOINABLE
    for column in join.columns or []:
        if column not in there:
            raise UserError(f"The score files {join.files} have no column for '{column}'.")
    wanted = there & set(join.columns or there)
    if not wanted:
        raise UserError(f"The score files {join.files} hold no scores, only {files[0].all_columns}.")
    return tuple(column for column in ALIASES if column in wanted)


def _load(
    connection: duckdb.DuckDBPyConnection,
    number: int,
    join: JoinConfig,
    files: Sequence[MetadataFile],
    columns: tuple[str, ...],
) -> tuple[int, int]:
    """Creates the table; returns the number of rows with a key, and how many repeated an earlier row's key."""
    rows, values = normalised_sql(files, compute_hash=join.by == "hash")
    table, names = _table(number), ", ".join(columns)
    connection.execute(
        f"CREATE OR REPLACE TABLE {table}_all AS SELECT {_KEYS[join.by]} AS key, {names} FROM ({rows})",  # noqa: S608
        values,
    )
    repeated = f"SELECT key FROM {table}_all GROUP BY key HAVING count(*) > 1"  # noqa: S608
    # Repeated keys are rare, so only their rows are sorted: by any order that does not depend on threads.
    connection.execute(
        f"""
        CREATE OR REPLACE TABLE {table} AS
        WITH repeated AS MATERIALIZED ({repeated})
        FROM {table}_all ANTI JOIN repeated USING (key) WHERE key IS NOT NULL
        UNION ALL
        FROM (FROM {table}_all SEMI JOIN repeated USING (key))
        QUALIFY row_number() OVER (PARTITION BY key ORDER BY {names}) = 1
        """
    )
    counted = connection.execute(f"SELECT (SELECT count(key) FROM {table}_all), (SELECT count(*) FROM {table})")  # noqa: S608
    num_rows, num_keys = counted.fetchall()[0]
    connection.execute(f"DROP TABLE {table}_all")
    return num_rows, num_rows - num_keys


def _remark(join: JoinConfig, columns: Sequence[str], num_rows: int, num_more: int) -> str:
    shown = f"{', '.join(columns)} come from {without_secrets(join.files)} ({num_rows:,} rows, by {join.by})"
    more = f"; {num_more:,} of them have the key of another row, and one row of each key was used" if num_more else ""
    return f"{shown} where the metadata has none{more}"


def _table(number: int) -> str:
    return f"join_{number}"
