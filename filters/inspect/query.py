"""Untrusted SQL over a dataset, one statement confined to the dataset and its metadata, and common questions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

import duckdb
import pyarrow as pa

from filters.recipe_record import read_recipe
from filters.select.faults import first_line
from filters.select.metadata_files import metadata_of, prepare
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.tables.connection import forget_files
from sdtrain.errors import UserError
from sdtrain.redaction import holds_secret

VIEWS_SQL = """
    SELECT name, comment FROM (
        SELECT view_name AS name, comment FROM duckdb_views() WHERE NOT internal
        UNION ALL SELECT table_name, comment FROM duckdb_tables()
    ) ORDER BY name
"""
_BATCH_ROWS = 50_000


class Question(NamedTuple):
    """A question and the SQL that answers it."""

    title: str
    sql: str


QUESTIONS = (
    Question("Where did my samples go?", "FROM funnel"),
    Question(
        "Which hosts fail most?",
        "FROM hosts WHERE tried >= 10 ORDER BY failed DESC, host LIMIT 10",
    ),
    Question(
        "Why was this image dropped?",
        "SELECT stage, reason, error_message FROM drops WHERE url LIKE '%-00042.%'",
    ),
    Question(
        "How many images fail to download, and why?",
        "SELECT reason, count(*) AS num, any_value(url) AS example FROM drops WHERE stage = 'download' "
        "GROUP BY reason ORDER BY num DESC",
    ),
    Question(
        "How are the aesthetic scores of the kept samples distributed?",
        "SELECT round(aesthetic, 1) AS score, count(*) AS num FROM kept GROUP BY score ORDER BY score",
    ),
    Question(
        "How large are the kept images really?",
        "SELECT quantile_disc(least(original_width, original_height), [0, 0.1, 0.5, 0.9, 1]) AS side_px FROM kept",
    ),
    Question(
        "Which samples speak of red circles?",
        "SELECT key, caption, url FROM kept WHERE caption ILIKE '%red circle%' ORDER BY key LIMIT 10",
    ),
    Question(
        "Which images are duplicates of one another?",
        "SELECT group_id, kind, list(url) AS urls FROM duplicates JOIN selection USING (uid) GROUP BY ALL LIMIT 10",
    ),
    Question(
        "Where is the latent of this URL, so that I can remove it?",
        "SELECT url, key, tar, \"offset\", num_bytes FROM latents WHERE url LIKE '%-00042.%'",
    ),
    Question(
        "Which stage takes how long?",
        "SELECT stage, sum(num_in) AS num, round(sum(seconds), 1) AS seconds, round(sum(num_in) / sum(seconds), 1) "
        "AS per_s FROM stages GROUP BY stage ORDER BY seconds DESC",
    ),
)
"""Ten examples, for `sdtrain query` or `duckdb -readonly metadata.duckdb`."""


@contextmanager
def ask(dataset: DatasetDir, sql: str, explain: bool = False) -> Iterator[pa.RecordBatchReader]:
    """Yields the result of one SELECT over the dataset's views (metadata.duckdb), in batches.

    The database is read-only; the query cannot reach files other than the dataset's and the metadata's, the network,
    settings or extensions. `sql` is one SELECT, FROM, DESCRIBE, SUMMARIZE or SHOW; `explain` returns the plan with the
    times of its steps instead of the result. UserError if there are no views yet, or the SQL is wrong or not allowed.
    """
    with closing(_open(dataset)) as connection:
        try:
            _check_reads(connection, sql)
            result = connection.execute(f"EXPLAIN ANALYZE {sql}" if explain else sql)
            # Closed too, because an open one keeps the database, and the next `ask` would wait forever.
            with result.to_arrow_reader(_BATCH_ROWS) as answer:
                yield answer
        except duckdb.Error as error:
            if isinstance(error, duckdb.PermissionException) and _was_moved(connection, dataset):
                raise UserError(
                    f"{dataset.root} was moved or copied since its views were written, and they read the old place. "
                    f"Run `sdtrain views {dataset.root}`, and ask again."
                ) from error
            raise UserError(f"The query cannot be answered. {_without_advice(error)}") from error


def _open(dataset: DatasetDir) -> duckdb.DuckDBPyConnection:
    recipe = read_recipe(dataset)
    if not dataset.database.exists():
        raise UserError(f"{dataset.root} has no metadata.duckdb yet. Finish the build, or run `sdtrain views`.")
    try:
        metadata = [file.path for file in metadata_of(recipe.select)]
        if any(map(holds_secret, metadata)):  # then the view is empty, see `filters.inspect.views`
            metadata = []
    except UserError:  # the dataset can be queried without its metadata
        metadata = []
    connection = duckdb.connect(dataset.database, read_only=True)
    prepare(connection, metadata)
    forget_files(connection)
    connection.execute("SET allowed_directories = ?", [[f"{dataset.root.absolute()}/"]])
    connection.execute("SET allowed_paths = ?", [metadata])
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def _was_moved(connection: duckdb.DuckDBPyConnection, dataset: DatasetDir) -> bool:
    """Whether the view of the selection, which every finished dataset has, reads files of another folder."""
    asked = "SELECT bool_and(NOT contains(sql, ?)) FROM duckdb_views() WHERE view_name = 'selection'"
    return bool(connection.execute(asked, [f"{dataset.root.absolute()}/"]).fetchall()[0][0])


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
