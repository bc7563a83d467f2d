"""SQL over metadata rows, and its Python functions: uid, LAION's hash, host, and the URL check."""

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
"""The uid of a metadata row."""
URL_CAPTION = f"md5_number({uid_text_sql(*_RAW)})"
"""The uid as a number, which takes a third of the memory."""

_HOST = "host_of_row"
# A host of letters, digits, hyphens and underscores, followed by nothing that changes the host.
_PLAIN = r"^(?i:https?)://([a-zA-Z0-9_-]+(?:[.][a-zA-Z0-9_-]+)*)(?:[/?#]|$)"
# A host among some, or a subdomain of theirs, in a plain URL.
_LISTED_BEGIN, _LISTED_END = r"^(?i:https?)://(?:[a-zA-Z0-9_-]+[.])*(?i:", r")(?:[/?#]|$)"
_MOST_IN_PATTERN = 1000
# A plain web address: no user, port or literal address, and a dotted name without a local suffix.
# Must never be looser than `why_not_allowed`.
_SURELY_FINE = (
    r"^(?i:https?)://(?:[a-zA-Z0-9_-]+\.)+"
    r"(?i:com|org|net|edu|gov|co|io|info|biz|me|tv|us|eu|uk|de|fr|it|es|nl|ru|pl|ca|au|jp|br|in|ch|se|no|dk|fi|at|be|cz)"
    r"(?:[/?#]|$)"
)


def laion_hash(url: str | None, caption: str | None) -> int:
    """Returns LAION's `hash` of a row: the signed first half of MurmurHash3 of URL and TEXT."""
    return _hash_of((url or "") + (caption or ""))


def hash_sql(url: str, caption: str) -> str:
    """Returns SQL for `laion_hash`, on connections with `register_laion_hash`."""
    return f"laion_hash(coalesce({url}, '') || coalesce({caption}, ''))"


def register_laion_hash(connection: duckdb.DuckDBPyConnection) -> None:
    """Registers LAION's hash on `connection` for `hash_sql`: about two million rows a second."""
    connection.create_function("laion_hash", _hash_of, [VARCHAR], BIGINT, type=PythonUDFType.NATIVE)


def _hash_of(text: str) -> int:
    return mmh3.hash64(text)[0]


def register_host_of(connection: duckdb.DuckDBPyConnection) -> None:
    """Registers `host_of` on `connection` for `host_sql`."""
    connection.create_function("host_of", host_of, [VARCHAR], VARCHAR, type=PythonUDFType.NATIVE)


def host_sql(column: str) -> str:
    """Returns SQL for a URL's host: a regular expression reads plain URLs (nearly all), Python the few others."""
    plain = f"lower(regexp_extract({column}, '{_PLAIN}', 1))"
    return f"CASE WHEN regexp_matches({column}, '{_PLAIN}') THEN {plain} ELSE host_of({column}) END"


def of_hosts_sql(column: str, hosts: Sequence[str], bound: str) -> str:
    """Returns the SQL condition that a URL is of one of the hosts, in lower case, or of their subdomains.

    `bound` is the parameter that holds them as a list. Up to 1,000 are one regular expression, which takes plain URLs a
    fifth of the time in which their hosts are taken apart.
    """
    lengths, url = sorted({host.count(".") + 1 for host in hosts}), f"trim({column})"
    if len(hosts) > _MOST_IN_PATTERN:
        suffixes = [host_suffix_sql(length, host_sql(url)) for length in lengths]
        return " OR ".join(f"{suffix} IN (SELECT unnest({bound}))" for suffix in suffixes)
    if not hosts:
        return "false"
    odd = [f"list_contains({bound}, {host_suffix_sql(length, f'host_of({url})')})" for length in lengths]
    listed = f"array_to_string(list_transform({bound}, host -> regexp_escape(host)), '|')"
    plain = f"regexp_matches({column}, '{_LISTED_BEGIN}' || {listed} || '{_LISTED_END}')"
    return f"CASE WHEN regexp_matches({column}, '{_PLAIN}') THEN {plain} ELSE {' OR '.join(odd)} END"


def register_url_check(connection: duckdb.DuckDBPyConnection, allow_private: bool) -> None:
    """Registers `why_not_allowed` on `connection` for `allowed_sql`."""

    def may_be_fetched(url: str) -> bool:
        return why_not_allowed(url, allow_private) is None

    connection.create_function("may_be_fetched", may_be_fetched, [VARCHAR], BOOLEAN, type=PythonUDFType.NATIVE)


def allowed_sql(column: str) -> str:
    """Returns the SQL condition for fetchable URLs: a regular expression accepts nearly all, Python checks the rest."""
    return f"CASE WHEN regexp_matches({column}, '{_SURELY_FINE}') THEN true ELSE may_be_fetched({column}) END"


class Lookup(NamedTuple):
    """A table to look rows up in, named `alias` in the items of `lookup_sql`.

    `key` is SQL of the row's value, to compare with `column`, where each value occurs at most once.
    """

    table: str
    alias: str
    key: str
    column: str = "key"


def lookup_sql(rows: str, lookups: Sequence[Lookup], items: str) -> str:
    """LEFT JOINs the lookup tables to `rows` (a SELECT, with `url` where keys name hosts, see `host_suffix_sql`).

    `items` follows `r.*`: more SELECT items, by the lookups' aliases, or REPLACE.
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


def host_suffix_sql(num_labels: int, host: str = _HOST) -> str:
    """Returns SQL for the last labels of a host, since a listed host covers its subdomains.

    `host` is SQL too: by default the URL's, in a `lookup_sql` key.
    """
    return f"array_to_string(string_split({host}, '.')[-{num_labels}:], '.')"
