"""The tables of all stages that name samples, whether the manifest knows them or not."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from filters.pipeline import STAGE_NAMES
from sdtrain.dataset.layout import DatasetDir


def stage_table(dataset: DatasetDir, stage: str, shard: int) -> Path:
    """A stage's table, which has one row a sample and a column `uid`."""
    places = {
        "select": dataset.selection,
        "download": dataset.images_table,
        "score": dataset.scores,
        "dedup": lambda shard: dataset.duplicates,
        "keep": lambda shard: dataset.decisions,
        "pack": dataset.packed_table,
        "encode": dataset.latents_table,
    }
    return places[stage](shard)


def tables_of(dataset: DatasetDir, stage: str) -> dict[int, Path]:
    """Shard -> table, for those that lie there."""
    first = stage_table(dataset, stage, 0)
    if stage in ("dedup", "keep"):
        return {0: first} if first.exists() else {}
    return {int(path.stem): path for path in sorted(first.parent.glob("[0-9]*.parquet"))}


def rows_sql(dataset: DatasetDir, columns: Sequence[str]) -> tuple[str, list[Any]]:
    """SQL for `uid` and some columns of all tables' rows, NULL where a table lacks one; and the values to bind."""
    parts, values = ["SELECT NULL::VARCHAR AS uid, " + ", ".join(_null(name) for name in columns)], list[Any]()
    for stage in STAGE_NAMES:
        paths = list(tables_of(dataset, stage).values())
        if paths:
            had = pq.read_schema(paths[0]).names
            selected = ", ".join(name if name in had else _null(name) for name in columns)
            parts.append(f"SELECT uid, {selected} FROM read_parquet(?, union_by_name = true)")  # noqa: S608
            values.append([str(path) for path in paths])
    everything = " UNION ALL ".join(parts)
    return f"SELECT * FROM ({everything}) WHERE uid IS NOT NULL", values  # noqa: S608


def touched_shards(
    connection: duckdb.DuckDBPyConnection, dataset: DatasetDir, uids: Collection[str]
) -> dict[str, list[int]]:
    """By stage, the shards whose tables name any of some samples."""
    connection.register("wanted", pa.table({"uid": pa.array(sorted(uids), pa.string())}))
    touched = {}
    for stage in STAGE_NAMES:
        shards = {str(path): shard for shard, path in tables_of(dataset, stage).items()}
        query = (
            "SELECT DISTINCT filename FROM read_parquet(?, filename = true, union_by_name = true) "
            "WHERE uid IN (SELECT uid FROM wanted)"
        )
        found = connection.execute(query, [list(shards)]).fetchall() if shards and uids else []
        touched[stage] = sorted(shards[name] for (name,) in found)
    connection.unregister("wanted")
    return touched


def _null(name: str) -> str:
    return f"NULL::{'BIGINT' if name == 'phash' else 'VARCHAR'} AS {name}"
