"""Side inputs of a selection: score files, blocklists, allowlists and the ledger of removed samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa

from filters.select.httpfs import is_remote
from filters.select.lists import Lists, list_files, load_lists
from filters.select.locations import is_parquet
from filters.select.metadata_files import prepare, read_footers
from filters.select.removed_rows import Blocked
from filters.select.schema import MetadataFile, check_hashes
from filters.select.score_joins import Joins, join_files, load_joins
from filters.select.sql_functions import register_laion_hash
from filters.select_config import SelectConfig
from sdtrain.dataset.removal_ledger import LEDGER, REMOVED
from sdtrain.redaction import without_secrets


@dataclass(frozen=True)
class SideInputs:
    """Joins and lists of a selection, in database tables.

    `compute_hash`: whether `normalised_sql` must fill missing `hash` values.
    """

    joins: Joins
    lists: Lists
    blocked: Blocked
    compute_hash: bool
    remarks: tuple[str, ...]

    def listed_sql(self, rows: str) -> str:
        """Adds `list_reason` to `rows` (a SELECT of at least our columns): why a row may not be used, or NULL."""
        known = self.blocked.sql(self.lists.sql(rows))
        reason = f"CASE WHEN is_removed THEN '{REMOVED}' ELSE list_reason END AS list_reason"
        return f"SELECT * EXCLUDE (is_removed) REPLACE ({reason}) FROM ({known})"  # noqa: S608


def has_side_inputs(select: SelectConfig) -> bool:
    """Returns whether a recipe names joins or lists."""
    return bool(select.joins or select.blocklists or select.allowlists)


def load_side_inputs(
    connection: duckdb.DuckDBPyConnection,
    select: SelectConfig,
    files: Sequence[MetadataFile],
    removed: pa.Table | None = None,
) -> SideInputs:
    """Reads joins and lists once into tables of the connection's database, shared with its cursors.

    Use `Joins.sql` around `normalised_sql(files, Pushdown(rules, null_passes | joins.columns), compute_hash)`, then the
    rules, then `Lists.sql` around the passing rows. The database may grow as large as score files and lists; `removed`
    is the ledger of samples that must not return. UserError if a file is missing, unreadable or does not fit.
    """
    remarks = list[str]()
    keys: set[str] = {join.by for join in select.joins}
    by_hash = "hash" in keys.union(config.by for config in (*select.blocklists, *select.allowlists))
    if by_hash:
        register_laion_hash(connection)
        prepare(connection, (file.path for file in files))
        num_checked = check_hashes(connection, files)
        remarks += [f"hash of URL and TEXT agrees in {num_checked:,} rows looked at"] if num_checked else []
        num = sum("hash" not in file.columns for file in files)
        remarks += [f"hash of URL and TEXT computed for {num} of {len(files)} files, which have none"] if num else []
    joins = load_joins(connection, select.joins)
    lists = load_lists(connection, select, files, joins.columns)
    blocked = Blocked(connection, LEDGER.empty_table() if removed is None else removed)
    return SideInputs(joins, lists, blocked, by_hash, (*remarks, *joins.remarks, *lists.remarks))


def identify_side_inputs(select: SelectConfig) -> list[list[object]]:
    """Returns a location-independent identity of joins and lists, by their contents, for a fingerprint."""
    found: list[list[object]] = [["join", join.by, join.columns, _named(join_files(join))] for join in select.joins]
    for kind, configs in (("blocklist", select.blocklists), ("allowlist", select.allowlists)):
        for config in configs:
            paths = list_files(config)
            parquet = read_footers([path for path in paths if is_parquet(path)])
            texts = [_text_identity(path) for path in paths if not is_parquet(path)]
            found.append([kind, config.by, _named(parquet), sorted(texts)])
    return found


def _named(files: Sequence[MetadataFile]) -> list[tuple[str, int, str]]:
    return sorted(file.identity for file in files)


def _text_identity(path: str) -> str:
    if not is_remote(path):
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    with closing(duckdb.connect()) as connection:
        prepare(connection, [path])
        digest = connection.execute("SELECT sha256(content) FROM read_blob(?)", [path]).fetchall()
        return str(digest[0][0]) if digest else without_secrets(path)
