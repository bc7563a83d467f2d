"""KEEP: every selected row ends as kept, or with the first reason that drops it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb

from filters.recipe import Recipe
from filters.rules import derived_sql, reason_case
from sdtrain.data.dataset import DatasetDir
from sdtrain.data.files import publish
from sdtrain.data.manifest import ShardReport, describe_outputs, fingerprint, require_entry
from sdtrain.data.selection import selected_shards, selection
from sdtrain.data.stage import Stage
from sdtrain.errors import UserError

# One row for every selected row, with the columns that rules name. Sizes are those of the picture as it was fetched.
_JOINED = """
SELECT s.uid, s.key, s.shard, i.reason AS download_reason, c.reason AS score_reason, d.group_id, d.kind,
       least(i.original_width, i.original_height) AS side,
       i.original_width::BIGINT * i.original_height AS area,
       greatest(i.original_width, i.original_height) / least(i.original_width, i.original_height) AS aspect_ratio,
       {captions}, {scores}
FROM (SELECT *, parse_filename(filename, true)::INTEGER AS shard
      FROM read_parquet($selection, filename = true, union_by_name = true)) s
LEFT JOIN read_parquet($images) i USING (uid)
LEFT JOIN read_parquet($scores) c USING (uid)
LEFT JOIN read_parquet($duplicates) d USING (uid)
"""
# The survivor of a group is the largest picture that passed every rule, then the best liked, then the smallest uid.
_DECIDED = """
WITH judged AS (SELECT *, {case} AS rule_reason FROM joined),
ranked AS (
    SELECT *, row_number() OVER (
        PARTITION BY group_id, rule_reason IS NULL ORDER BY area DESC, aesthetic DESC NULLS LAST, uid
    ) AS place FROM judged
)
SELECT uid, key, shard, coalesce(
    rule_reason, CASE WHEN group_id IS NOT NULL AND place > 1 THEN 'duplicate_' || kind END
) AS reason
FROM ranked ORDER BY key
"""
_BEFORE_RULES = "WHEN download_reason IS NOT NULL THEN download_reason WHEN score_reason IS NOT NULL THEN score_reason "


def decide(dataset: DatasetDir, recipe: Recipe, target: Path) -> dict[str | None, int]:
    """Writes the decision on every selected row to `target`; returns how many have each reason (None: kept)."""
    case, values = reason_case(recipe.keep.rules)
    case = case.replace("CASE ", f"CASE {_BEFORE_RULES}") if values else f"CASE {_BEFORE_RULES} END"
    origin = "s" if recipe.keep.decide_by == "metadata" else "c"
    scores = ", ".join(
        f"{origin}.{name}::DOUBLE AS {name}" for name in ("aesthetic", "pwatermark", "punsafe", "similarity")
    )
    captions = derived_sql(("caption_chars", "caption_words", "caption_is_name"), caption="s.caption")
    with duckdb.connect() as connection:
        connection.execute(
            f"CREATE TEMP TABLE joined AS {_JOINED.format(captions=captions, scores=scores)}", _sources(dataset)
        )
        # `case` holds only the names and conditions of filters.rules; the recipe's values are bound.
        connection.execute(f"CREATE TEMP TABLE decided AS {_DECIDED.format(case=case)}", values)
        connection.execute("COPY decided TO ? (FORMAT parquet, COMPRESSION zstd)", [str(target)])
        return dict(
            connection.execute("SELECT reason, count(*) FROM decided GROUP BY reason ORDER BY reason").fetchall()
        )


def _sources(dataset: DatasetDir) -> dict[str, list[str] | str]:
    """The Parquet files of each stage, as its manifest lists them."""
    shards = selected_shards(dataset)
    return {
        "selection": [str(dataset.selection(shard)) for shard in shards],
        "images": [str(dataset.images_table(shard)) for shard in shards],
        "scores": [str(dataset.scores(shard)) for shard in shards],
        "duplicates": str(dataset.duplicates),
    }


def _shards(dataset: DatasetDir, recipe: Recipe) -> list[int]:
    return [0]


def _fingerprint(dataset: DatasetDir, recipe: Recipe, shard: int) -> str:
    # The selection too: LAION's scores, which may decide, are nowhere else.
    select = selection(dataset)
    shards = selected_shards(dataset)
    inputs = [require_entry(dataset, stage, shard) for stage in ("download", "score") for shard in shards]
    # As pairs, because the order of the rules decides the reasons.
    config = {"decide_by": recipe.keep.decide_by, "rules": list(recipe.keep.rules.items())}
    return fingerprint("keep/1", config, [select, *inputs, require_entry(dataset, "dedup", 0)])


def _run(dataset: DatasetDir, recipe: Recipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    with publish(dataset.decisions) as temporary:
        counts = decide(dataset, recipe, temporary)
        kept = counts.pop(None, 0)
        dropped = {str(reason): count for reason, count in counts.items()}
        if not kept:
            listed = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
            raise UserError(f"No picture in {dataset.root} is kept ({listed}). Loosen the recipe's keep.rules.")
    num_in = selection(dataset).num_out
    outputs = describe_outputs(dataset, [dataset.decisions])
    yield ShardReport(stage="keep", shard=0, num_in=num_in, num_out=kept, dropped=dropped, outputs=outputs)


KEEP: Stage[Recipe] = Stage("keep", _shards, _fingerprint, _run)
