"""Blocklists and allowlists, applied to rows that pass the rules."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import duckdb
import pyarrow as pa

from filters.select.faults import first_line
from filters.select.httpfs import is_remote
from filters.select.list_entries import Entry, read_entries
from filters.select.locations import PARQUET, find_files, is_parquet
from filters.select.metadata_files import prepare, read_footers
from filters.select.named_columns import OWN_UID
from filters.select.schema import MetadataFile, check_hashes, normalised_sql, quoted
from filters.select.sql_functions import (
    UID,
    URL_CAPTION,
    Lookup,
    hash_sql,
    host_suffix_sql,
    lookup_sql,
    register_host_of,
)
from filters.select_config import ListConfig, SelectConfig
from sdtrain.errors import UserError
from sdtrain.redaction import without_secrets

# A row's key in our columns.
_KEYS = {
    "url": "md5_number(trim(url))",
    "hash": f"coalesce(hash, {hash_sql('url', 'caption')})",
    "uid": f"md5_number({UID})",
    "md5": "md5_number(md5)",
    "sha256": "md5_number(sha256)",
    "url_caption": URL_CAPTION,
}
# Parquet columns that hold entries in text-file form.
_ENTRY_COLUMNS = {"host": ("host", "domain"), "uid": ("uid",)}
_TEXT_SUFFIXES = (".txt", ".csv", ".tsv", ".list")
_BATCH = 100_000
WHICH_UID = "sdtrain's uid (the md5 of URL, line feed and caption)"


@dataclass(frozen=True)
class _Table:
    """A list in table `list_<number>`, with column `key`."""

    number: int
    by: str
    allows: bool
    num_labels: tuple[int, ...]
    """Label counts of the listed hosts; empty for other lists."""
    has_own_uids: bool = False
    """Whether the rows have `OWN_UID`."""

    @property
    def lookups(self) -> list[Lookup]:
        """Returns one lookup, or one per label count for hosts, or two for the two kinds of uids."""
        keys = [host_suffix_sql(num) for num in self.num_labels] if self.by == "host" else [_KEYS[self.by]]
        if self.by == "uid" and self.has_own_uids:
            keys.append(f"md5_number(lower({quoted(OWN_UID)}))")
        return [Lookup(f"list_{self.number}", f"l{self.number}_{n}", key) for n, key in enumerate(keys)]

    @property
    def lists_row(self) -> str:
        """Returns the SQL condition for rows on the list."""
        return f"({' OR '.join(f'{lookup.alias}.key IS NOT NULL' for lookup in self.lookups) or 'false'})"


@dataclass(frozen=True)
class Lists:
    """Blocklists and allowlists in tables of a connection."""

    tables: tuple[_Table, ...] = ()
    remarks: tuple[str, ...] = ()

    def sql(self, rows: str) -> str:
        """Adds `list_reason` to `rows` (a SELECT of at least our columns): why a list refuses the row, or NULL."""
        if not self.tables:
            return f"SELECT *, NULL::VARCHAR AS list_reason FROM ({rows})"  # noqa: S608
        lookups = [lookup for table in self.tables for lookup in table.lookups]
        return lookup_sql(rows, lookups, f", {self._case()} AS list_reason")

    def _case(self) -> str:
        blocked = [table.lists_row for table in self.tables if not table.allows]
        refused = [f"NOT {table.lists_row}" for table in self.tables if table.allows]
        branches = [(blocked, "blocklisted"), (refused, "not_allowlisted")]
        cases = [f"WHEN {' OR '.join(conditions)} THEN '{reason}'" for conditions, reason in branches if conditions]
        return f"CASE {' '.join(cases)} END"


def load_lists(
    connection: duckdb.DuckDBPyConnection,
    select: SelectConfig,
    files: Sequence[MetadataFile],
    joined: Collection[str] = (),
) -> Lists:
    """Reads a recipe's lists into tables of `connection`, which also reads the metadata.

    Lists keyed by hash need `laion_hash` (`filters.select.sql_functions.register_laion_hash`). `joined` names the
    columns that score files add. UserError if a list is missing, unreadable or keyed by a missing column.
    """
    tables, remarks = [], list[str]()
    configs = [(config, False) for config in select.blocklists] + [(config, True) for config in select.allowlists]
    if any(config.by == "host" for config, _ in configs):
        register_host_of(connection)
    has_own_uids = any(OWN_UID in file.carried for file in files)
    for number, (config, allows) in enumerate(configs):
        remarks += _check_key(config, files, joined)
        try:
            num_entries, num_unusable = _load(connection, number, config)
        except duckdb.Error as error:
            raise UserError(f"The list {config.files} cannot be read: {first_line(error)}") from error
        num_labels = _num_labels(connection, number, config)
        tables.append(_Table(number, config.by, allows, num_labels, has_own_uids))
        remarks.append(_remark(config, allows, num_entries, num_unusable))
        remarks += [_which_uid(config, has_own_uids)] if config.by == "uid" else []
    return Lists(tuple(tables), tuple(remarks))


def list_files(config: ListConfig) -> list[str]:
    """Returns paths or URLs of a list's files; raises `UserError` if there are none."""
    return find_files(config.files, "a blocklist or allowlist", (PARQUET, *_TEXT_SUFFIXES))


def _check_key(config: ListConfig, files: Sequence[MetadataFile], joined: Collection[str]) -> list[str]:
    if config.by not in ("md5", "sha256") or config.by in joined:
        return []
    num_without = sum(config.by not in file.columns for file in files)
    if num_without == len(files):
        raise UserError(
            f"The list {config.files} is keyed by {config.by}, which the metadata does not have. Bring it "
            "with `select.joins`, or use a list of URLs or hashes."
        )
    shown = without_secrets(config.files)
    without = f"{num_without} of {len(files)} files have no {config.by}: the list {shown} knows none of their rows"
    return [without] if num_without else []


def _load(connection: duckdb.DuckDBPyConnection, number: int, config: ListConfig) -> tuple[int, int]:
    """Creates the table; returns its number of entries and the number of Parquet rows without one."""
    table, kind = (
        f"list_{number}",
        "BIGINT" if config.by == "hash" else "VARCHAR" if config.by == "host" else "UHUGEINT",
    )
    connection.execute(f"CREATE OR REPLACE TABLE {table}_all (key {kind})")
    paths = list_files(config)
    prepare(connection, paths)
    for path in paths:
        if not is_parquet(path):
            _insert(connection, f"{table}_all", config.by, read_entries(_lines(connection, path), config.by, path))
    parquet = read_footers([path for path in paths if is_parquet(path)])
    if config.by in _ENTRY_COLUMNS:
        for file in parquet:
            entries = read_entries(_column(connection, file, config.by), config.by, file.path)
            _insert(connection, f"{table}_all", config.by, entries)
    elif parquet:
        _insert_keys(connection, f"{table}_all", config.by, parquet)
    connection.execute(f"CREATE OR REPLACE TABLE {table} AS SELECT DISTINCT key FROM {table}_all WHERE key IS NOT NULL")  # noqa: S608
    counted = f"SELECT (SELECT count(*) FROM {table}), (SELECT count(*) - count(key) FROM {table}_all)"  # noqa: S608
    num_entries, num_unusable = connection.execute(counted).fetchall()[0]
    connection.execute(f"DROP TABLE {table}_all")
    return num_entries, num_unusable


def _insert(connection: duckdb.DuckDBPyConnection, table: str, by: str, entries: Iterator[Entry]) -> None:
    key = "entry" if by in ("hash", "host") else "md5_number(entry)"
    while batch := list(islice(entries, _BATCH)):
        connection.register("batch", pa.table({"entry": batch}))
        connection.execute(f"INSERT INTO {table} SELECT {key} FROM batch")  # noqa: S608
        connection.unregister("batch")


def _insert_keys(connection: duckdb.DuckDBPyConnection, table: str, by: str, files: Sequence[MetadataFile]) -> None:
    for file in files:
        needed = {"url", "caption"} if by == "url_caption" or (by == "hash" and by not in file.columns) else {by}
        if not needed <= set(file.columns):
            raise UserError(_no_column(file, by, sorted(needed)))
    if by == "hash":
        check_hashes(connection, files)
    rows, values = normalised_sql(files, compute_hash=by == "hash")
    key = "hash" if by == "hash" else _KEYS[by]
    connection.execute(f"INSERT INTO {table} SELECT {key} FROM ({rows})", values)  # noqa: S608


def _column(connection: duckdb.DuckDBPyConnection, file: MetadataFile, by: str) -> Iterable[str]:
    names = [name for name in file.all_columns if name.lower() in _ENTRY_COLUMNS[by]]
    if not names:
        raise UserError(_no_column(file, by, _ENTRY_COLUMNS[by]))
    query = f"SELECT DISTINCT {quoted(names[0])}::VARCHAR AS entry FROM read_parquet(?) ORDER BY entry"  # noqa: S608
    return [entry for (entry,) in connection.execute(query, [file.path]).fetchall() if entry is not None]


def _no_column(file: MetadataFile, by: str, needed: Sequence[str]) -> str:
    return (
        f"{file.path} is no list by {by}: it has no column {' and '.join(needed)}. "
        f"It has: {', '.join(file.all_columns)}."
    )


def _lines(connection: duckdb.DuckDBPyConnection, path: str) -> Iterator[str]:
    try:
        if is_remote(path):
            yield from connection.execute("SELECT content FROM read_text(?)", [path]).fetchall()[0][0].splitlines()
            return
        with Path(path).open(encoding="utf-8-sig", newline="\n") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start:,}).") from error


def _num_labels(connection: duckdb.DuckDBPyConnection, number: int, config: ListConfig) -> tuple[int, ...]:
    if config.by != "host":
        return ()
    query = f"SELECT DISTINCT len(string_split(key, '.')) AS num FROM list_{number} ORDER BY num"  # noqa: S608
    return tuple(num for (num,) in connection.execute(query).fetchall())


def _which_uid(config: ListConfig, has_own_uids: bool) -> str:
    own = "and the metadata's own column uid" if has_own_uids else "alone: the metadata has no column uid of its own"
    return f"uids of {without_secrets(config.files)} are compared with {WHICH_UID} {own}"


def _remark(config: ListConfig, allows: bool, num_entries: int, num_unusable: int) -> str:
    unusable = f"; {num_unusable:,} rows of it hold none and were passed over" if num_unusable else ""
    kind = "allowlist" if allows else "blocklist"
    return f"{kind} {without_secrets(config.files)}: {num_entries:,} entries, by {config.by}{unusable}"
