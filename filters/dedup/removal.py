"""Removes samples from the groups of duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import duckdb

from filters.dedup.levels import LEVELS
from filters.recipe import Recipe
from sdtrain.dataset.files import publish, scratch_path
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import selected_entries
from sdtrain.dataset.rewriting import Removed, described_again
from sdtrain.dataset.shard_report import ShardReport

_REGROUPED = """
SELECT * REPLACE (min(uid) OVER (PARTITION BY group_id) AS group_id) FROM read_parquet($table)
WHERE uid NOT IN (SELECT unnest($uids)) QUALIFY count(*) OVER (PARTITION BY group_id) > 1 ORDER BY uid
"""
_COUNTED = """
SELECT kind, count(*) FROM (
    SELECT kind, row_number() OVER (PARTITION BY group_id ORDER BY list_position($levels, kind), uid) AS place
    FROM read_parquet($table)
) WHERE place > 1 GROUP BY kind ORDER BY kind
"""


def regroup(dataset: DatasetDir, recipe: Recipe, shard: int, removed: Removed) -> None:
    """Regroups without removed members; drops groups with a single one left."""
    if not removed.uids:
        return
    spill = str(scratch_path(dataset.root, "dedup"))
    with publish(removed.table) as temporary, duckdb.connect(config={"temp_directory": spill}) as connection:
        values = {"table": str(removed.table), "uids": list(removed.uids), "target": str(temporary)}
        connection.execute(f"COPY ({_REGROUPED}) TO $target (FORMAT parquet, COMPRESSION zstd)", values)


def recount(dataset: DatasetDir, entry: ShardReport, tables: Sequence[Path]) -> ShardReport:
    """Recounts: all members of a group but one are dropped, by the level that found them."""
    with duckdb.connect() as connection:
        dropped = dict(connection.execute(_COUNTED, {"levels": list(LEVELS), "table": str(tables[0])}).fetchall())
    num_in = selected_entries(dataset, "score").total("num_out")
    counts = {"num_in": num_in, "num_out": num_in - sum(dropped.values()), "dropped": dropped}
    return described_again(dataset, entry, counts)
