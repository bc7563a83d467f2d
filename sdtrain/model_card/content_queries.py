"""Questions to a dataset's metadata.duckdb about the content that a model was trained on, each with its answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
from pydantic import Field

from sdtrain.dataset.files import publish
from sdtrain.dataset.tables.connection import connected
from sdtrain.errors import UserError
from sdtrain.settings import Settings

_HOST = "lower(regexp_extract(url, '^[a-zA-Z]+://(?:[^/?#]*@)?([^/?#:]+)', 1))"
_SECOND = "ac|co|com|edu|gob|gov|ne|net|nom|or|org"
_NAME = rf"([^.]+[.](?:(?:{_SECOND})[.][a-z][a-z]|[^.]+))$"
DOMAIN = (
    f"CASE WHEN regexp_matches(host, '^[0-9.]+$') THEN host "
    f"ELSE coalesce(nullif(regexp_extract(host, '{_NAME}', 1), ''), host) END"
)
"""SQL of a host's domain: its last two labels, three where those are like co.uk; an address stays whole."""
_OPT_OUTS = "'robots_txt', 'robots_header', 'tdm_reserved'"
_ILLEGAL = "'max_unsafe', 'nsfw_tags', 'punsafe_missing', 'nsfw_missing', 'blocklisted', 'removed'"

NUM_ROWS = "SELECT max(remaining) FROM funnel"
NUM_SELECTED = "SELECT min(remaining) FROM funnel WHERE stage = 'select'"
NUM_FETCHED = "SELECT min(remaining) FROM funnel WHERE stage IN ('select', 'download')"
NUM_KEPT = "SELECT min(remaining) FROM funnel"
BYTES = "SELECT sum(bytes) FROM stages WHERE stage = 'pack'"
FIRST = "SELECT strftime(min(finished_at), '%Y-%m-%d') FROM stages WHERE stage = 'download'"
LAST = "SELECT strftime(max(finished_at), '%Y-%m-%d') FROM stages WHERE stage = 'download'"
OPT_OUTS = (
    "SELECT reason, error_message AS signal, count(*) AS images FROM images "  # noqa: S608 - names are from here
    f"WHERE reason IN ({_OPT_OUTS}) GROUP BY ALL ORDER BY images DESC, signal LIMIT 50"
)
LISTS = (
    "SELECT reason, meaning, dropped AS rows FROM funnel "
    "WHERE stage = 'select' AND reason IN ('blocklisted', 'not_allowlisted', 'removed')"
)
ILLEGAL = f"SELECT stage, reason, meaning, dropped AS rows FROM funnel WHERE reason IN ({_ILLEGAL})"  # noqa: S608
SYNTHETIC = (
    "SELECT source, count(*) AS captions FROM captions JOIN decisions USING (uid) "
    "WHERE reason IS NULL AND source <> 'alt' GROUP BY source ORDER BY source"
)
_KEPT_URLS = "SELECT i.url FROM images i JOIN decisions d USING (uid) WHERE d.reason IS NULL"
_DOMAINS = (
    f"SELECT {DOMAIN} AS domain, count(*) AS images FROM (SELECT {_HOST} AS host FROM ({{urls}})) GROUP BY domain"  # noqa: S608
)
NUM_DOMAINS = "SELECT count(*) FROM domains"
_TOP = "SELECT ceil(count(*) / 10) FROM domains"
TOP = f"SELECT domain, images FROM domains ORDER BY images DESC, domain LIMIT ({_TOP})"  # noqa: S608
TOP_IMAGES = f"SELECT sum(images) FROM ({TOP})"  # noqa: S608 - names are from here


class Number(Settings):
    """An answer of one value; None if the dataset does not record it."""

    value: int | str | None
    query: str


class Listed(Settings):
    """An answer of rows."""

    columns: list[str] = Field(default=[])
    rows: list[list[int | str | None]] = Field(default=[])
    query: str


class Questions:
    """Asks one dataset; see `asking`."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self._connection = connection
        self._with = ""

    def number(self, sql: str) -> Number:
        """The value of a query; None if the dataset, one of an earlier version, lacks a column of it."""
        row = self._execute(sql).fetchone() if self._has(sql) else None
        value = row[0] if row else None
        return Number(value=int(value) if isinstance(value, float) else value, query=self._shown(sql))

    def rows(self, sql: str, limit: int | None = None) -> Listed:
        """The rows of a query, the first ones if there is a limit."""
        if not self._has(sql):
            return Listed(query=self._shown(sql))
        answer = self._execute(sql)
        names = [name for name, *_ in answer.description]
        found = answer.fetchall() if limit is None else answer.fetchmany(limit)
        return Listed(columns=names, rows=[list(row) for row in found], query=self._shown(sql))

    def has(self, view: str) -> bool:
        """Whether the dataset has a view."""
        return bool(self._connection.execute("SELECT 1 FROM duckdb_views() WHERE view_name = ?", [view]).fetchone())

    def group_by_domain(self) -> None:
        """Counts the kept images of each domain, for `NUM_DOMAINS` and the others of `domains`."""
        encoded = self._execute("SELECT sum(num_out) FROM stages WHERE stage = 'encode'").fetchone()
        # One scan instead of a join, where the latents are of all kept images.
        is_encoded = encoded == self._execute(NUM_KEPT).fetchone()
        domains = _DOMAINS.format(urls="SELECT url FROM latents" if is_encoded else _KEPT_URLS)
        self._execute(f"CREATE TEMP TABLE domains AS {domains}")
        self._with = f"WITH domains AS ({domains}) "

    def write_csv(self, sql: str, path: Path) -> None:
        """Writes the rows of a query."""
        with publish(path) as temporary:
            target = str(temporary).replace("'", "''")
            self._execute(f"COPY ({sql}) TO '{target}' (FORMAT csv, HEADER)")

    def _shown(self, sql: str) -> str:
        """The query as anybody can ask it."""
        return self._with + sql if "domains" in sql else sql

    def _has(self, sql: str) -> bool:
        if "finished_at" not in sql:
            return True
        columns = {name for name, *_ in self._execute("DESCRIBE stages").fetchall()}
        return "finished_at" in columns

    def _execute(self, sql: str) -> Any:
        return self._connection.execute(sql)


@contextmanager
def asking(database: Path, dataset: str) -> Iterator[Questions]:
    """Opens a dataset's metadata.duckdb; UserError if it is not there, or cannot answer."""
    if not database.exists():
        raise UserError(
            f"The dataset {dataset} has no metadata.duckdb here, from which its content is summarised. Finish its "
            f"build, or run `sdtrain views {dataset}`."
        )
    try:
        with connected(database, read_only=True) as connection:
            yield Questions(connection)
    except duckdb.Error as error:
        raise UserError(
            f"{database} cannot answer what the summary asks: {str(error).splitlines()[0]} If the dataset was moved, "
            f"run `sdtrain views {dataset}`."
        ) from error
