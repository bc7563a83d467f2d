"""SQL over metadata rows, and the Python functions that it calls: uid, LAION's hash, host, and the check of URLs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import duckdb
import mmh3
from duckdb.func import PythonUDFType
from duckdb.sqltypes import BIGINT, BOOLEAN, VARCHAR

from sdtrain.dataset.addresses import host_of, why_not_allowed
from sdtrain.dataset.uid import uid_sql, uid_text_sql

_RAW = ("trim(coalesce(url, ''))", "coalesce(caption, '')")
UID = uid_sql(*_RAW)
"""The uid of a row as the metadata has it."""
URL_CAPTION = f"md5_number({uid_text_sql(*_RAW)})"
"""The same as a number, which takes a third of the memory."""

_HOST = "host_of_row"
# A host of letters, digits, hyphens and underscores, followed by nothing that changes what the host is.
_PLAIN = r"^(?i:https?)://([a-zA-Z0-9_-]+(?:[.][a-zA-Z0-9_-]+)*)(?:[/?#]|$)"
# A plain web address: no user, no port, no literal address, a name with a dot that does not end like a local one.
# It must be stricter than `why_not_allowed`, never looser.
_SURELY_FINE = (
    r"^(?i:https?)://(?:[a-zA-Z0-9_-]+\.)+"
    r"(?i:com|org|net|edu|gov|co|io|info|biz|me|tv|us|eu|uk|de|fr|it|es|nl|ru|pl|ca|au|jp|br|in|ch|se|no|dk|fi|at|be|cz)"
    r"(?:[/?#]|$)"
)


def laion_hash(url: str | None, caption: str | None) -> int:
    """LAION's `hash` of a row: the first half of MurmurHash3 of URL and TEXT, signed."""
    return _hash_of((url or "") + (caption or ""))


def hash_sql(url: str, caption: str) -> str:
    """SQL for the same, for connections that know it (`register_laion_hash`)."""
    return f"laion_hash(coalesce({url}, '') || coalesce({caption}, ''))"


def register_laion_hash(connection: duckdb.DuckDBPyConnection) -> None:
    """Makes LAION's hash a SQL function of `connection`, for `hash_sql`: about two million rows a second."""
    connection.create_function("laion_hash", _hash_of, [VARCHAR], BIGINT, type=PythonUDFType.NATIVE)


def _hash_of(text: str) -> int:
    return mmh3.hash64(text)[0]


def register_host_of(connection: duckdb.DuckDBPyConnection) -> None:
    """Makes `host_of` a SQL function of `connection`, for `host_sql`."""
    connection.create_function("host_of", host_of, [VARCHAR], VARCHAR, type=PythonUDFType.NATIVE)


def host_sql(column: str) -> str:
    """SQL for the host of a URL: nearly all are plain, which a regular expression reads, and Python the few others."""
    plain = f"lower(regexp_extract({column}, '{_PLAIN}', 1))"
    return f"CASE WHEN regexp_matches({column}, '{_PLAIN}') THEN {plain} ELSE host_of({column}) END"


def register_url_check(connection: duckdb.DuckDBPyConnection, allow_private: bool) -> None:
    """Makes `why_not_allowed` a SQL function of `connection`, for `allowed_sql`."""

    def may_be_fetched(url: str) -> bool:
        return why_not_allowed(url, allow_private) is None

    connection.create_function("may_be_fetched", may_be_fetched, [VARCHAR], BOOLEAN, type=PythonUDFType.NATIVE)


def allowed_sql(column: str) -> str:
    """SQL condition that is true for URLs that may be fetched.

    Nearly all URLs of LAION are plain ones, which a regular expression can tell; Python looks at the few others only.
    """
    return f"CASE WHEN regexp_matches({column}, '{_SURELY_FINE}') THEN true ELSE may_be_fetched({column}) END"


class Lookup(NamedTuple):
    """A table in which rows are looked up.

    Attributes:
        table: its name.
        alias: for the items of `lookup_sql`.
        key: SQL of the row's value, which the table has at most once.
        column: of the table, to compare it with.
    """

    table: str
    alias: str
    key: str
    column: str = "key"


def lookup_sql(rows: str, lookups: Sequence[Lookup], items: str) -> str:
    """`rows` (a SELECT), each with what the tables have under its keys.

    Args:
        rows: to look up, with column `url` where keys name hosts (`host_suffix_sql`).
        lookups: LEFT JOINs, by their aliases.
        items: what follows `r.*`: more SELECT items, or REPLACE.
    """
    keys = list(dict.fromkeys(lookup.key for lookup in lookups))
    hosts = f", {host_sql('trim(url)')} AS {_HOST}" if any(_HOST in key for key in keys) else ""
    named = "".join(f", {key} AS key_{n}" for n, key in enumerate(keys))
    keyed = f"SELECT *{named} FROM (SELECT *{hosts} FROM ({rows}))"  # noqa: S608
    joins = " ".join(
        f"LEFT JOIN {table} {alias} ON {alias}.{column} = r.key_{keys.index(key)}"
        for table, alias, key, column in lookups
    )
    hidden = ", ".join([f"key_{n}" for n in range(len(keys))] + ([_HOST] if hosts else []))
    # S608: names and expressions are constants, and numbers.
    return f"SELECT r.*{f' EXCLUDE ({hidden})' if hidden else ''}{items} FROM ({keyed}) r {joins}"  # noqa: S608


def host_suffix_sql(num_labels: int) -> str:
    """A key of `lookup_sql`: the last labels of the URL's host, for a listed host means its subdomains too."""
    return f"array_to_string(string_split({_HOST}, '.')[-{num_labels}:], '.')"
