"""Untrusted SQL over a dataset: one statement, confined to the dataset and its metadata."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import duckdb
import pyarrow as pa

from filters.recipe_record import read_recipe
from filters.select.metadata_files import find_metadata, first_line, prepare
from sdtrain.dataset.layout import DatasetDir
from sdtrain.errors import UserError
from sdtrain.redaction import holds_secret

VIEWS_SQL = """
    SELECT name, comment FROM (
        SELECT view_name AS name, comment FROM duckdb_views() WHERE NOT internal
        UNION ALL SELECT table_name, comment FROM duckdb_tables()
    ) ORDER BY name
"""
_BATCH_ROWS = 50_000


@contextmanager
def ask(dataset: DatasetDir, sql: str, explain: bool = False) -> Iterator[pa.RecordBatchReader]:
    """Yields the result of one SELECT over the dataset's views (metadata.duckdb), in batches.

    The database is read-only; the query cannot reach files other than the dataset's and the metadata's, the network,
    settings or extensions. `sql` is one SELECT, FROM, DESCRIBE, SUMMARIZE or SHOW; `explain` returns the plan with
    the times of its steps instead of the result.

    Raises:
        UserError: there are no views yet, or the SQL is wrong or not allowed.
    """
    with closing(_open(dataset)) as connection:
        try:
            _check_reads(connection, sql)
            result = connection.execute(f"EXPLAIN ANALYZE {sql}" if explain else sql)
            # Closed too, because an open one keeps the database, and the next `ask` would wait forever.
            with result.to_arrow_reader(_BATCH_ROWS) as answer:
                yield answer
        except duckdb.Error as error:
            raise UserError(f"The query cannot be answered. {_without_advice(error)}") from error


def _open(dataset: DatasetDir) -> duckdb.DuckDBPyConnection:
    recipe = read_recipe(dataset)
    if not dataset.database.exists():
        raise UserError(f"{dataset.root} has no metadata.duckdb yet. Finish the build, or run `sdtrain views`.")
    try:
        metadata = [file.path for file in find_metadata(recipe.select.metadata, recipe.select.swapped_sizes)]
        if any(map(holds_secret, metadata)):  # then the view is empty, see `filters.inspect.views`
            metadata = []
    except UserError:  # the dataset can be queried without its metadata
        metadata = []
    connection = duckdb.connect(dataset.database, read_only=True)
    prepare(connection, metadata)
    connection.execute("SET allowed_directories = ?", [[f"{dataset.root.absolute()}/"]])
    connection.execute("SET allowed_paths = ?", [metadata])
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def _check_reads(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise UserError(f"A query is one SQL statement; this is {len(statements)}.")
    if statements[0].type != duckdb.StatementType.SELECT:
        kind = str(statements[0].type).rpartition(".")[2]
        raise UserError(f"A query may only read (SELECT, FROM, DESCRIBE, SUMMARIZE), and this is {kind}.")


def _without_advice(error: duckdb.Error) -> str:
    # Its second paragraph shows the position; "LINE 1" and the pointer below it are worth keeping.
    return str(error).strip() if isinstance(error, duckdb.ParserException) else first_line(error)
