"""DECIDE: every selected row ends as kept, or with the first reason that drops it."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from filters.ask_rules import COLUMN as ANSWERS
from filters.ask_rules import questions_of
from filters.columns import TABLES
from filters.recipe import DecideConfig, Recipe
from filters.rules import (
    DERIVED,
    RuleValue,
    active_rules,
    decide_item,
    in_words,
    reason_case,
    rule_of,
    stage_item,
    stage_rules,
)
from filters.select.faults import first_line
from filters.select.removed_rows import near_duplicate_uids
from sdtrain.dataset.files import publish, raise_if_disk_full, scratch_path
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import (
    describe_outputs,
    require_entries,
    require_entry,
    selected_entries,
    selected_shards,
    selection,
)
from sdtrain.dataset.removal_ledger import REMOVED, read_ledger, removed_hashes
from sdtrain.dataset.rewriting import Removed, Rewriting, count_rows, drop_rows
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import NOTHING, Drops, Stage, Table, always_on, nothing_beside, one_shard
from sdtrain.dataset.sync import fetch_outputs
from sdtrain.dataset.tables.carried import carried_columns
from sdtrain.dataset.tables.columns import Scan, TableColumns
from sdtrain.dataset.tables.connection import connected, unordered
from sdtrain.dataset.work import WORK
from sdtrain.errors import UserError
from sdtrain.pack.plan import shortened

# One row per selected row, with the columns that rules name. Sizes are the downloaded image's.
_JOINED = """
SELECT s.uid, s.key, s.shard, i.reason AS download_reason, c.reason AS score_reason, d.group_id, d.kind,
       i.original_width::BIGINT * i.original_height AS area, b.uid IS NOT NULL AS is_removed, {columns}
FROM (SELECT *, parse_filename(filename, true)::INTEGER AS shard FROM ({selection})) s
LEFT JOIN ({images}) i USING (uid)
LEFT JOIN ({scores}) c USING (uid)
LEFT JOIN read_parquet($duplicates) d USING (uid)
LEFT JOIN blocked b USING (uid)
{joins}
"""
_HASHES = "SELECT uid, phash FROM ({images}) UNION ALL SELECT uid, phash FROM ({scores})"
# Of each group, the largest image that passes every rule stays, then the best scored, then the smallest uid.
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
_BEFORE_RULES = (
    "WHEN download_reason IS NOT NULL THEN download_reason WHEN score_reason IS NOT NULL THEN score_reason "
    f"WHEN is_removed THEN '{REMOVED}' "
)


def decide(dataset: DatasetDir, recipe: Recipe, target: Path | None = None) -> dict[str | None, int]:
    """Decides on each row of a dataset finished to `dedup`, into `target` if given; counts by reason (None: kept).

    UserError if a table is missing, damaged or without a column that a rule names.
    """
    try:
        return _decide(dataset, recipe, target)
    except duckdb.Error as error:
        raise_if_disk_full(error, dataset.decisions)
        raise UserError(
            f"The tables of {dataset.root} cannot be read as they must be for decisions ({first_line(error)}). Run the "
            "build again: it makes what is missing or damaged. Tables of an older version must be deleted first."
        ) from error


def _decide(dataset: DatasetDir, recipe: Recipe, target: Path | None) -> dict[str | None, int]:
    case, values = reason_case(recipe.decide.rules)
    case = f"coalesce(CASE {_BEFORE_RULES} END, {case})"
    columns, measured = ", ".join(_columns(dataset, recipe.decide)), _measured(dataset, recipe.decide)
    tables = TableColumns(dataset)
    sources = _sources(dataset, tables)
    scans = {name: tables.scan(paths, name) for name, paths in measured.items()}
    joins = "\n".join(f"LEFT JOIN ({scan.sql}) {name} USING (uid)" for name, scan in scans.items())
    with connected(spill=scratch_path(dataset.root, "decide")) as connection:
        connection.register("blocked", _near_duplicates_of_removed(connection, dataset, sources))
        joined = _JOINED.format(columns=columns, joins=joins, **{name: scan.sql for name, scan in sources.items()})
        tables.save()
        bound = ChainMap(*(scan.values for scan in (*sources.values(), *scans.values())))
        with unordered(connection):
            values_of = {"duplicates": str(dataset.duplicates), **bound}
            connection.execute(f"CREATE TEMP TABLE joined AS {joined}", values_of)
        # `case` holds only the names and conditions of filters.rules; the recipe's values are bound.
        connection.execute(f"CREATE TEMP TABLE decided AS {_DECIDED.format(case=case)}", values)
        if target:
            connection.execute("COPY decided TO ? (FORMAT parquet, COMPRESSION zstd)", [str(target)])
        return dict(
            connection.execute("SELECT reason, count(*) FROM decided GROUP BY reason ORDER BY reason").fetchall()
        )


def _columns(dataset: DatasetDir, decide: DecideConfig) -> Iterator[str]:
    """Yields SELECT items of the rules' columns and the score to rank duplicates; UserError if no score can decide."""
    rules = [rule_of(name, decide.rules[name]) for name in active_rules(decide.rules)]
    for column in dict.fromkeys(["aesthetic", *(rule.column for rule in rules if rule.stage is None)]):
        _check_known(dataset, column, decide)
        yield decide_item(column, decide.decide_by)
    for number, found in enumerate(stage_rules(decide.rules).values()):
        yield from (stage_item(rule, f"measured_{number}") for rule in found)


def _measured(dataset: DatasetDir, decide: DecideConfig) -> dict[str, list[Path]]:
    """Returns the tables of the stages that rules name, by their alias."""
    found: dict[str, list[Path]] = {}
    for number, stage in enumerate(stage_rules(decide.rules)):
        fetch_outputs(dataset, stage, tars=False)
        names = [name for entry in _finished(dataset, stage) for name in entry.outputs if name.endswith(".parquet")]
        found[f"measured_{number}"] = [dataset.root / name for name in names]
        if stage == "ask":
            _check_asked(dataset.root / names[0], decide)
    return found


def _check_asked(answers: Path, decide: DecideConfig) -> None:
    """Refuses questions that were not asked, by the first image of which there are answers."""
    lines = decide.rules["ask"]
    first = pq.ParquetFile(answers).read([ANSWERS]).slice(0, 1).to_pylist()
    known = dict(first[0][ANSWERS]) if first else None
    if known is not None and (
        new := [q for q in questions_of(lines if isinstance(lines, list) else []) if q not in known]
    ):
        raise UserError(f"decide.rules.ask: nobody was asked {new[0]!r} yet. Build the dataset with this rule first.")


def _finished(dataset: DatasetDir, stage: str) -> Sequence[ShardReport]:
    """Returns the entries of a stage of which at least the first shard is finished."""
    require_entry(dataset, stage, 0)
    return selected_entries(dataset, stage)


def _check_known(dataset: DatasetDir, column: str, decide: DecideConfig) -> None:
    """Refuses rules on columns that selections may lack: V1's scores, and a user's own."""
    if column not in TABLES and column not in DERIVED and column not in carried_columns(_selections(dataset)[0]):
        raise UserError(f"decide.rules: {column} is no column of {dataset.root}: name it in select.carry.")
    files = _selections(dataset) if column == "aesthetic_v1" and decide.decide_by == "metadata" else []
    if files and not any(column in pq.read_schema(path).names for path in files):
        raise UserError(
            f"decide.rules: min_aesthetic_v1 looks at the scores of LAION's first predictor, which the metadata of "
            f"{dataset.root} do not have. Set decide.decide_by: image and score.aesthetic_v1_weights, or leave it out."
        )


def _near_duplicates_of_removed(
    connection: duckdb.DuckDBPyConnection, dataset: DatasetDir, sources: Mapping[str, Scan]
) -> pa.Table:
    """Returns uids of images similar to one that was removed with a radius."""
    ledger = read_ledger(dataset.removed)
    if not len(removed_hashes(ledger)):
        return pa.table({"uid": pa.array([], pa.string())})
    images, scores = sources["images"], sources["scores"]
    hashes = _HASHES.format(images=images.sql, scores=scores.sql)
    return near_duplicate_uids(connection, hashes, images.values | scores.values, ledger)


def _selections(dataset: DatasetDir) -> list[Path]:
    return [dataset.selection(shard) for shard in selected_shards(dataset)]


def _sources(dataset: DatasetDir, tables: TableColumns) -> dict[str, Scan]:
    """Scans of the tables that each selected shard has; those of other versions may have other columns."""
    paths = {"selection": dataset.selection, "images": dataset.images_table, "scores": dataset.scores}
    shards = selected_shards(dataset)
    return {name: tables.scan([path(shard) for shard in shards], name) for name, path in paths.items()}


def _shards(dataset: DatasetDir, recipe: Recipe) -> list[int]:
    return [0]


def _fingerprint(dataset: DatasetDir, recipe: Recipe, shard: int) -> str:
    # The selection too: only it holds LAION's scores, which may decide.
    select = selection(dataset)
    shards = selected_shards(dataset)
    inputs = (entry for stage in ("download", "score") for entry in require_entries(dataset, stage, shards))
    # As pairs, because the order of the rules decides the reasons.
    # The stage and the value were once called "keep" and "picture"; finished datasets record their digest.
    decide_by = "picture" if recipe.decide.decide_by == "image" else recipe.decide.decide_by
    config: dict[str, object] = {"decide_by": decide_by, "rules": list(recipe.decide.rules.items())}
    removed = removed_hashes(read_ledger(dataset.removed))
    config |= {"removed": removed.to_pylist()} if len(removed) else {}
    # Those that are packed, whether or not a rule looks at them: PACK has this fingerprint in its own.
    captioned = require_entries(dataset, "caption", shards) if recipe.caption.is_on else []
    measured = [entry for stage in stage_rules(recipe.decide.rules) for entry in _finished(dataset, stage)]
    return fingerprint("keep/1", config, [select, *inputs, require_entry(dataset, "dedup", 0), *captioned, *measured])


def _run(dataset: DatasetDir, recipe: Recipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    with publish(dataset.decisions) as temporary:
        counts = decide(dataset, recipe, temporary)
        report = report_of(dataset, counts)
    yield report.model_copy(update={"outputs": describe_outputs(dataset, [dataset.decisions])})


def report_of(dataset: DatasetDir, counts: Mapping[str | None, int]) -> ShardReport:
    """Builds the stage's report from counts by reason; raises `UserError` if no row is kept."""
    dropped = {str(reason): count for reason, count in counts.items() if reason is not None}
    kept = counts.get(None, 0)
    if not kept:
        listed = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
        unknown = any(reason.endswith("_missing") for reason in dropped)
        hint = " Missing scores: the metadata has none, or their weights are null in score; see decide_by."
        raise UserError(
            f"No image in {dataset.root} is kept ({listed}). Loosen the recipe's decide.rules.{hint if unknown else ''}"
        )
    return ShardReport(stage="decide", shard=0, num_in=selection(dataset).num_out, num_out=kept, dropped=dropped)


def _rules(recipe: Recipe) -> dict[str, RuleValue]:
    return recipe.decide.rules


def _path(dataset: DatasetDir, shard: int) -> Path:
    return dataset.decisions


def _drop(dataset: DatasetDir, recipe: Recipe, shard: int, removed: Removed) -> None:
    is_packed = removed.uids and removed.finished.get("pack")
    drop_rows(removed.table, removed.uids, shortened(dataset, recipe.pack, removed.uids) if is_packed else None)


DECIDE: Stage[Recipe] = Stage(
    *("decide", _shards, _fingerprint, _run),
    is_on=always_on,
    inputs=dict.fromkeys(("select", "download", "score", "dedup"), "all shards"),
    planned_by=None,
    num_shards=one_shard,
    beside=nothing_beside,
    table=Table(
        view="decisions",
        comment="One row for every selected row: kept (reason is NULL), or the first reason that dropped it",
        columns={"uid": "VARCHAR", "key": "VARCHAR", "shard": "INTEGER", "reason": "VARCHAR"},
        path=_path,
        rewriting=Rewriting(origins={}, has_tar=False, drop=_drop, recount=count_rows),
    ),
    drops=Drops(
        repeats=True,
        rules=_rules,
        last={
            REMOVED: "taken out of this dataset for good",
            "duplicate_exact": "the same pixels as a kept image",
            "duplicate_perceptual": "looks like a kept image",
            "duplicate_altered": "a mirrored, cropped or watermarked copy of a kept image",
            "duplicate_copied": "an edited copy of a kept image, as SSCD's embeddings tell",
            "duplicate_semantic": "shows the same as a kept image",
        },
        explain=in_words,
    ),
    uses_gpu=False,
    needs=NOTHING,
    work=WORK["decide"],
)
