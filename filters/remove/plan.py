"""REMOVE: permanently removes samples from every stage by rewriting only the shards that hold them.

| file | what happens |
|---|---|
| selection, images, scores, duplicates, decisions | the rows go; all others keep their keys |
| captions | the rows go, and those of others whose texts come from removed samples |
| images, dataset, latents (tar) | the members go; all others are copied, their JSON without texts of removed samples |
| manifest | counts and digests are updated; what was finished stays finished |
| removed.parquet | digests of removed samples, to recognise them later |
| removed-rows.parquet | digests and former rows of these, to tell which training steps saw them |
| metadata.duckdb, report.html, images/, index.json | rewritten |

A removed row counts as dropped by `select` for the reason `removed`. From then on `select` drops removed uids, URLs and
hosts, `download` refuses a removed sha256, and `decide` drops images similar to one that was removed with a radius.

The plan (removal.json) is written before anything is touched. If killed, the next `sdtrain remove`, `decide` or `build`
first completes it; nothing else may use the dataset meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from filters import pipeline
from filters.recipe import Recipe
from filters.recipe_record import read_recipe
from filters.select.list_entries import Entry, read_entries
from filters.select.removed_rows import Blocked, near_duplicate_uids
from sdtrain.dataset.files import read_parquet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.removal_ledger import LEDGER, Kind, key_digest, read_ledger
from sdtrain.dataset.stage import Stage
from sdtrain.dataset.tables.columns import TableColumns
from sdtrain.dataset.tables.connection import connected
from sdtrain.errors import UserError

_COLUMNS = {"url": ("url",), "host": ("host", "domain"), "uid": ("uid",), "sha256": ("sha256",), "phash": ("phash",)}

_SEEN = {"url": "VARCHAR", "sha256": "VARCHAR", "phash": "BIGINT"}
_FILES_AT_ONCE = 8192
"""Files in one query, which keeps 3 kB for each until its end."""
# One file may serve all shards.
_SHARD = "coalesce(TRY_CAST(parse_filename(filename, true) AS INTEGER), 0)"


@dataclass(frozen=True)
class Removal:
    """The effect of a removal list on a dataset.

    Attributes:
        by: the kind of the list's entries.
        num_listed: samples that an entry names.
        num_same_bytes: others with identical bytes.
        num_near_duplicates: others that are near-duplicates of these.
        num_duplicates_left: others that stay, although the dataset groups them with a removed one as duplicates.
        rows: additions to the ledger.
        uids: of the samples to remove.
        touched: by stage, the shards whose files hold any of these samples.
    """

    by: Kind
    num_entries: int
    num_listed: int
    num_same_bytes: int
    num_near_duplicates: int
    num_duplicates_left: int
    rows: pa.Table
    uids: Collection[str]
    touched: dict[str, list[int]]

    @property
    def num_samples(self) -> int:
        """The number of samples to remove."""
        return self.num_listed + self.num_same_bytes + self.num_near_duplicates

    @property
    def has_effect(self) -> bool:
        """Whether anything is removed or newly blocked."""
        return bool(self.num_samples or len(self.rows))

    def counts(self) -> dict[str, Any]:
        """The same in numbers, with the shards by stage."""
        numbers = ("by", "num_entries", "num_listed", "num_same_bytes", "num_near_duplicates", "num_duplicates_left")
        return {name: getattr(self, name) for name in numbers} | {
            "touched": {stage: sorted(shards) for stage, shards in self.touched.items()},
            "num_newly_blocked": len(self.rows),
        }

    def sentences(self) -> list[str]:
        """Describes the removal for the terminal."""
        others = [
            f"{number:,} {what}"
            for number, what in (
                (self.num_same_bytes, "others with the same bytes"),
                (self.num_near_duplicates, "others that are near-duplicates"),
            )
            if number
        ]
        found = f"{self.num_entries:,} entries by {self.by}: {self.num_listed:,} samples" + "".join(
            f", {other}" for other in others
        )
        shards = ", ".join(f"{stage} {len(shards):,}" for stage, shards in self.touched.items() if shards)
        rewritten = [f"shards to rewrite: {shards}"] if shards else ["Nothing of it is in the dataset."]
        duplicates = (
            [f"{self.num_duplicates_left:,} duplicates of these stay; --radius removes near-duplicates too."]
            if self.num_duplicates_left
            else []
        )
        blocked = [] if len(self.rows) else ["All of it is blocked already."]
        return [found, *rewritten, *duplicates, *blocked]


def find_removal(dataset: DatasetDir, path: Path, by: Kind, radius: int | None = None) -> Removal:
    """Resolves a list's entries (of kind `by`) in a dataset in any state; writes nothing.

    `radius` also removes near-duplicates: perceptual hashes that differ in at most this many bits. UserError if there
    is no dataset, or the list cannot be read.
    """
    recipe = read_recipe(dataset)  # fails if there is no dataset
    entries = sorted(set(read_list(path, by)))
    blocks = _ledger([_entry_row(by, entry, radius or 0) for entry in entries], by)
    with TemporaryDirectory() as folder, connected(Path(folder) / "seen.duckdb") as connection:
        search = _Search(connection, dataset)
        listed = search.blocked(blocks)
        same = search.same_bytes(listed)
        near = _ledger([_hash_row(phash, radius) for phash in search.hashes(listed)]) if radius is not None else None
        similar = search.blocked(near) - listed - same if near is not None else set[str]()
        found = listed | same | similar
        follows = [_row("uid", digest=key_digest("uid", uid)) for uid in found]
        follows += [_row("sha256", digest=key_digest("sha256", sha256)) for sha256 in search.sha256s(found)]
        rows = [blocks, _ledger(follows), *([near] if near is not None else [])]
        num_duplicates = len(search.duplicates(found) - found)
        touched = search.touched_shards(found, pipeline.stages_of(recipe))
    unknown = _without_known(pa.concat_tables(rows), read_ledger(dataset.removed))
    return Removal(by, len(entries), len(listed), len(same), len(similar), num_duplicates, unknown, found, touched)


def read_list(path: Path, by: Kind) -> Iterator[Entry]:
    """Yields a list's entries: text with one a line and comments after #, or Parquet with a column named like `by`.

    UserError if it is missing, unreadable, or of another form.
    """
    try:
        if path.suffix == ".parquet":
            yield from read_entries(_column(path, by), by, str(path))
        else:
            with path.open(encoding="utf-8-sig") as file:
                yield from read_entries(file, by, str(path))
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(f"The list {path} cannot be read: {error}") from error


def _column(path: Path, by: Kind) -> Iterable[str]:
    names = pq.read_schema(path).names
    named = [name for name in names if name.lower() in _COLUMNS[by]]
    if not named:
        raise UserError(
            f"{path} is no list by {by}: it has no column {' or '.join(_COLUMNS[by])}. It has: {', '.join(names)}."
        )
    column = read_parquet(path, named[:1])[named[0]].drop_null()
    return (str(value) for value in column.to_pylist())


class _Search:
    """Finds samples in all stages of a dataset, stale files included."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, dataset: DatasetDir) -> None:
        self._connection, self._duplicates = connection, dataset.duplicates
        connection.execute("SET preserve_insertion_order = false")
        # Materialised, because each query would read all of it again.
        columns = ", ".join(f"{name} {kind}" for name, kind in _SEEN.items())
        connection.execute(f"CREATE TABLE seen (uid VARCHAR, {columns}, stage VARCHAR, shard INTEGER)")
        for rows, files in _rows_sql(dataset):
            connection.execute(f"INSERT INTO seen SELECT * FROM ({rows}) WHERE uid IS NOT NULL", {"files": files})  # noqa: S608

    def blocked(self, ledger: pa.Table) -> set[str]:
        """Returns the uids that a ledger blocks."""
        known = Blocked(self._connection, ledger).sql("SELECT * FROM seen", uid="uid")
        found = self._uids(f"SELECT uid FROM ({known}) WHERE is_removed")  # noqa: S608
        return found | set(
            near_duplicate_uids(self._connection, "SELECT uid, phash FROM seen", {}, ledger)["uid"].to_pylist()
        )

    def same_bytes(self, uids: set[str]) -> set[str]:
        """Returns other uids of images downloaded as the same bytes."""
        sha256s = "SELECT sha256 FROM seen WHERE sha256 IS NOT NULL AND uid IN (SELECT unnest(?))"
        return self._uids(f"SELECT uid FROM seen WHERE sha256 IN ({sha256s})", [sorted(uids)]) - uids  # noqa: S608

    def duplicates(self, uids: set[str]) -> set[str]:
        """Returns uids in the same groups of duplicates."""
        if not self._duplicates.exists():
            return set()
        groups = "SELECT group_id FROM read_parquet($table) WHERE uid IN (SELECT unnest($uids))"
        values = {"table": str(self._duplicates), "uids": sorted(uids)}
        return self._uids(f"SELECT uid FROM read_parquet($table) WHERE group_id IN ({groups})", values)  # noqa: S608

    def sha256s(self, uids: set[str]) -> list[str]:
        """Returns digests of the uids' downloaded bytes."""
        return self._values("sha256", uids)

    def hashes(self, uids: set[str]) -> list[int]:
        """Returns the uids' perceptual hashes."""
        return self._values("phash", uids)

    def touched_shards(self, uids: set[str], stages: Sequence[Stage[Recipe]]) -> dict[str, list[int]]:
        """Returns by stage, all of `stages` and others with old files, the shards whose tables hold any of the uids."""
        query = "SELECT DISTINCT stage, shard FROM seen WHERE uid IN (SELECT unnest(?)) ORDER BY ALL"
        touched: dict[str, list[int]] = {stage.name: [] for stage in stages}
        for stage, shard in self._connection.execute(query, [sorted(uids)]).fetchall():
            touched.setdefault(stage, []).append(shard)
        return touched

    def _values(self, column: str, uids: set[str]) -> list[Any]:
        query = (
            f"SELECT DISTINCT {column} FROM seen WHERE {column} IS NOT NULL AND uid IN (SELECT unnest(?)) ORDER BY 1"  # noqa: S608
        )
        return [value for (value,) in self._connection.execute(query, [sorted(uids)]).fetchall()]

    def _uids(self, query: str, values: list[Any] | dict[str, Any] | None = None) -> set[str]:
        return {uid for (uid,) in self._connection.execute(query, values).fetchall()}


def _rows_sql(dataset: DatasetDir) -> Iterator[tuple[str, list[str]]]:
    """Yields SQL for all tables' rows with their stage and shard, and the files to bind, some tables at a time.

    A column that a table lacks is NULL.
    """
    tables = TableColumns(dataset)
    for stage in pipeline.STAGES:
        paths = list(stage.table.files(dataset).values()) if stage.table else []
        for group in tables.groups(paths):
            had = pq.read_schema(group[0]).names
            selected = ", ".join(name if name in had else _null(name) for name in _SEEN)
            scan = "read_parquet($files, filename = true)"
            parts = [f"SELECT uid, {selected}, '{stage.name}', {_SHARD} FROM {scan}"]  # noqa: S608
            # A table is touched too where another sample has a text of a removed one.
            absent = ", ".join(map(_null, _SEEN))
            for each in _origins(stage, had):
                origins = f"SELECT uid, {each} AS origin, filename FROM {scan}"  # noqa: S608
                parts.append(
                    f"SELECT origin, {absent}, '{stage.name}', {_SHARD} FROM ({origins}) WHERE origin <> uid"  # noqa: S608
                )
            for first in range(0, len(group), _FILES_AT_ONCE):
                yield " UNION ALL ".join(parts), list(map(str, group[first : first + _FILES_AT_ONCE]))
    tables.save()


def _origins(stage: Stage[Recipe], columns: Collection[str]) -> list[str]:
    return [sql for name, sql in stage.table.rewriting.origins.items() if name in columns] if stage.table else []


def _null(name: str) -> str:
    return f"NULL::{_SEEN[name]} AS {name}"


def _entry_row(by: Kind, entry: Entry, radius: int) -> dict[str, Any]:
    if by == "phash":
        return _hash_row(int(entry), radius)
    labels = str(entry).count(".") + 1 if by == "host" else None
    return _row(by, digest=key_digest(by, str(entry)), labels=labels)


def _hash_row(phash: int, radius: int | None) -> dict[str, Any]:
    return _row("phash", phash=phash, radius=radius)


def _row(kind: Kind, **values: Any) -> dict[str, Any]:
    return {"kind": kind} | values


def _ledger(rows: list[dict[str, Any]], listed_by: Kind | None = None) -> pa.Table:
    return pa.Table.from_pylist([row | {"listed_by": listed_by} for row in rows], LEDGER)


def _without_known(rows: pa.Table, ledger: pa.Table) -> pa.Table:
    """Returns the rows that block something neither the ledger nor an earlier row blocks."""
    identity = [tuple(row.values()) for row in pa.concat_tables([ledger, rows]).select(LEDGER.names[:5]).to_pylist()]
    seen, is_new = set[tuple[Any, ...]](), list[bool]()
    for known in identity:
        is_new.append(known not in seen)
        seen.add(known)
    new = rows.filter(pa.array(is_new[len(ledger) :], pa.bool_()))
    now = datetime.now(UTC).replace(microsecond=0)
    place = LEDGER.get_field_index("removed_at")
    return new.set_column(place, LEDGER.field(place), pa.array([now] * len(new), LEDGER.field(place).type))
