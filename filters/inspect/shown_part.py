"""Narrows metadata.duckdb's views to a part of a large dataset, which is enough for a report's examples and plots."""

from __future__ import annotations

import random
from itertools import takewhile

import duckdb
import numpy as np

from filters import pipeline
from filters.columns import SCORE_COLUMNS
from filters.decide.stage import DECIDE
from filters.inspect.views import derived_views, view_over
from filters.recipe import Recipe
from filters.rules import RULES, derived_sql, reason_case
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import selected_entries
from sdtrain.dataset.stage import Table
from sdtrain.report.examples import GROUPS

MAX_ROWS, MAX_SHARDS = 1_000_000, 2_000
"""Datasets of more selected rows or shards are shown in part."""
_METADATA_ROWS = 200_000
"""Of the metadata's first rows: the histogram draws no more."""

_OF_GROUPS = f"""
SELECT DISTINCT shard FROM decisions WHERE uid IN (
    SELECT uid FROM duplicates WHERE group_id IN (
        SELECT group_id FROM duplicates GROUP BY group_id ORDER BY md5(group_id) LIMIT {GROUPS}
    )
)
"""  # noqa: S608 - a number


def narrow(connection: duckdb.DuckDBPyConnection, dataset: DatasetDir, recipe: Recipe) -> str:
    """Hides the views of a large dataset behind temporary ones of some of its shards; describes them, else "".

    `connection` has metadata.duckdb open. The shards are chosen at random, the same ones each time, and those of the
    groups of duplicates that the report shows are added. One question then reads a few hundred files, not 132,000.
    """
    downloaded = selected_entries(dataset, "download")
    rows = downloaded.table["num_in"].to_numpy()
    if rows.sum() <= MAX_ROWS and len(rows) <= MAX_SHARDS:
        return ""
    order = random.Random(0).sample(range(len(rows)), len(rows))
    few = order[: min(MAX_SHARDS, 1 + int(np.searchsorted(np.cumsum(rows[order]), MAX_ROWS)))]
    of_groups = {shard for (shard,) in connection.execute(_OF_GROUPS).fetchall()}
    shards = sorted({*downloaded.shards[few].tolist(), *of_groups})
    _hide(connection, dataset, recipe, shards)
    return f"Examples, histograms and comparisons are of {len(shards):,} of the {len(rows):,} shards, drawn at random."


def _hide(connection: duckdb.DuckDBPyConnection, dataset: DatasetDir, recipe: Recipe, shards: list[int]) -> None:
    connection.execute(
        "CREATE TEMP TABLE decisions AS FROM decisions WHERE shard IN (SELECT unnest($shards))", {"shards": shards}
    )
    connection.execute("CREATE TEMP TABLE metadata AS FROM metadata LIMIT ?", [_METADATA_ROWS])
    _hide_unselected(connection, recipe)
    for stage in takewhile(lambda stage: stage is not DECIDE, pipeline.STAGES):
        if stage.table and _is_by_shard(stage.table, dataset):
            files = [stage.table.path(dataset, shard) for shard in shards]
            view = view_over(connection, dataset, stage.table, [path for path in files if path.exists()])
            connection.execute(f'CREATE TEMP VIEW "{stage.table.view}" AS {view}')
    for name, statement in derived_views(recipe):
        connection.execute(f'CREATE TEMP VIEW "{name}" AS {statement}')


def _hide_unselected(connection: duckdb.DuckDBPyConnection, recipe: Recipe) -> None:
    """Rows of the metadata that fail a rule by a value of their own: which others are not selected, all shards say."""
    rules = {name: value for name, value in recipe.select.rules.items() if _is_of_metadata(name, recipe)}
    reason, values = reason_case(rules, null_passes={RULES[name].column for name in rules})
    rows = f"SELECT *, {derived_sql()} FROM metadata"  # noqa: S608 - names are from RULES
    connection.execute(
        f"CREATE TEMP TABLE unselected AS FROM ({rows}) WHERE {reason} IS NOT NULL",
        values,
    )


def _is_of_metadata(rule: str, recipe: Recipe) -> bool:
    return rule in RULES and not (recipe.select.joins and RULES[rule].column in SCORE_COLUMNS)


def _is_by_shard(table: Table[Recipe], dataset: DatasetDir) -> bool:
    return table.path(dataset, 0) != table.path(dataset, 1)
