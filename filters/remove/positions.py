"""Records which rows a removal takes out of the shards that training reads, so that runs can be asked for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from filters.remove.plan import Removal
from sdtrain.dataset.addresses import host_of
from sdtrain.dataset.files import publish, scratch_path
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.removal_ledger import key_digest
from sdtrain.dataset.sync import push_files
from sdtrain.dataset.tables.columns import TableColumns
from sdtrain.dataset.tables.connection import connected
from sdtrain.exposure.removed_rows import NO_ROW, SCHEMA, read_removed_rows
from sdtrain.loading.shard_catalog import footer_digest

_STAGES = ("pack", "encode")
_SIDES = ("height", "width")


def record_rows(dataset: DatasetDir, removal: Removal, number: int) -> None:
    """Records the rows of the removal's samples, before anything is touched; `number` counts earlier removals.

    What a removal of this number recorded before is replaced: it was killed before it began.
    """
    with connected(spill=scratch_path(dataset.root, "positions")) as connection:
        connection.execute("SET preserve_insertion_order = false")
        reading = _Reading(connection, dataset, removal)
        found = [row for stage in _STAGES for row in reading.rows(stage)]
    if not found:
        return
    stated = {"removal": number, "removed_at": datetime.now(UTC).replace(microsecond=0)}
    new = pa.Table.from_pylist([row | stated for row in found], SCHEMA)
    known = read_removed_rows(dataset.removed_rows)
    _write(dataset, pa.concat_tables([known.filter(pc.not_equal(known["removal"], number)), new]))


def record_rewritten(dataset: DatasetDir, number: int) -> None:
    """Adds what the tables of a removal are after it."""
    rows = read_removed_rows(dataset.removed_rows)
    if not pc.any(pc.equal(rows["removal"], number)).as_py():
        return
    afters = list[str | None]()
    digests = dict[Path, str | None]()
    for row in rows.select(["removal", "stage", "table", "after"]).to_pylist():
        if row["removal"] == number:
            path = _folder(dataset, row["stage"]) / row["table"]
            if path not in digests:
                digests[path] = footer_digest(path) if path.exists() else None  # its tar was lost, and so it went
            row["after"] = digests[path]
        afters.append(row["after"])
    place = SCHEMA.get_field_index("after")
    _write(dataset, rows.set_column(place, SCHEMA.field(place), pa.array(afters, pa.string())))


def _write(dataset: DatasetDir, rows: pa.Table) -> None:
    with publish(dataset.removed_rows) as temporary:
        pq.write_table(rows, temporary, compression="zstd")
    push_files(dataset, dataset.removed_rows)


def _folder(dataset: DatasetDir, stage: str) -> Path:
    return (dataset.latents_table(0) if stage == "encode" else dataset.packed_table(0)).parent


def _described(stage: str, table: Path) -> dict[str, Any]:
    num_rows = pq.read_metadata(table).num_rows
    return {"stage": stage, "table": table.name, "before": footer_digest(table), "num_rows": num_rows}


class _Reading:
    """Reads the tables that a removal touches."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, dataset: DatasetDir, removal: Removal) -> None:
        self._connection, self._dataset, self._removal = connection, dataset, removal
        self._columns = TableColumns(dataset)
        images = [dataset.images_table(shard) for shard in removal.touched.get("download", [])]
        described = self._select("uid, url, sha256", [path for path in images if path.exists()])
        self._described = {row["uid"]: row for row in described}

    def rows(self, stage: str) -> Iterator[dict[str, Any]]:
        """The rows of SCHEMA of one stage's shards, but for the removal's number and time.

        A table that loses no row, only texts of removed samples, has one with NO_ROW.
        """
        folder = _folder(self._dataset, stage)
        paths = [folder / f"{shard:05d}.parquet" for shard in self._removal.touched.get(stage, [])]
        columns = 'uid, height, width, parse_filename(filename) AS "table", file_row_number AS row'
        existing = [path for path in paths if path.exists()]
        tables = {path.name: _described(stage, path) for path in existing}
        without = set(tables)
        for row in sorted(self._select(columns, existing), key=lambda row: (row["table"], row["row"])):
            without.discard(row["table"])
            yield row | tables[row["table"]] | self._keys(row["uid"])
        yield from (tables[table] | {"row": NO_ROW} for table in sorted(without))

    def _keys(self, uid: str) -> dict[str, Any]:
        """Digests of the sample's keys."""
        described = self._described.get(uid, {})
        url, sha256 = described.get("url"), described.get("sha256")
        labels = host_of(url).split(".") if url else []
        return {
            "uid": key_digest("uid", uid),
            "url": key_digest("url", url.strip()) if url else None,
            "sha256": key_digest("sha256", sha256) if sha256 else None,
            "hosts": [key_digest("host", ".".join(labels[begin:])) for begin in range(len(labels))],
        }

    def _select(self, columns: str, paths: Sequence[Path]) -> list[dict[str, Any]]:
        parts, values = list[str](), dict[str, Any]({"uids": list(self._removal.uids)})
        for number, group in enumerate(self._columns.groups(paths)):
            values[f"paths_{number}"] = list(map(str, group))
            source = f"read_parquet($paths_{number}, filename = true, file_row_number = true)"
            had = pq.read_schema(group[0]).names
            for name in _SIDES:  # packed images have none, nor have latents of the first versions
                source = source if name in had else f"(SELECT *, NULL AS {name} FROM {source})"  # noqa: S608
            parts.append(f"SELECT {columns} FROM {source} WHERE uid IN (SELECT unnest($uids))")  # noqa: S608 - constants
        if not parts:
            return []
        rows: list[dict[str, Any]] = (
            self._connection.execute(" UNION ALL ".join(parts), values).to_arrow_table().to_pylist()
        )
        return rows
