"""Opens DuckDB for questions that read one file a shard, in memory that hardly grows with their number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb


@contextmanager
def connected(
    database: Path | str = ":memory:", spill: Path | None = None, read_only: bool = False
) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yields a connection and closes it.

    `spill` is the folder for what memory does not hold, created if needed: by default the database's, or the working
    directory.
    """
    config: dict[str, str | bool | int | float | list[str]] = {"temp_directory": str(spill)} if spill else {}
    connection = duckdb.connect(str(database), read_only=read_only, config=config)
    try:
        forget_files(connection)
        yield connection
    finally:
        connection.close()


@contextmanager
def unordered(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Tables created in the block hold their rows in any order: to keep it, DuckDB needs 65 kB for each file read."""
    connection.execute("SET preserve_insertion_order = false")
    yield
    connection.execute("SET preserve_insertion_order = true")


def forget_files(connection: duckdb.DuckDBPyConnection) -> None:
    """Turns off DuckDB's copy of every file that it has read, 20 kB for each Parquet file however small.

    Few files are read twice, and the system has its own copy of those.
    """
    connection.execute("SET enable_external_file_cache = false")
