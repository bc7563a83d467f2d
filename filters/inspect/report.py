"""Final outputs of a build, written beside its shards once every stage is finished."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from filters import pipeline
from filters.caption.duplicates import forget_duplicate_texts
from filters.decide.losses import heavy_losses
from filters.inspect.views import write_views
from filters.recipe import NETWORKS, Recipe
from filters.rules import RULES, Rule, decide_item, select_item, stage_item
from filters.select.faults import first_line
from filters.select.metadata_files import prepare
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import newest_change_ns, recorded_stages
from sdtrain.dataset.storage import storage_of
from sdtrain.errors import UserError
from sdtrain.models.weights import RANDOM, RANDOM_FULL
from sdtrain.pack.plan import forget_plan
from sdtrain.pack.stage import write_index

if TYPE_CHECKING:
    from sdtrain.report.examples import RuleThreshold


def finish_dataset(dataset: DatasetDir, recipe: Recipe) -> None:
    """Writes the packed shards' index, the DuckDB views and, if anything changed, the report."""
    forget_plan(dataset)
    forget_duplicate_texts(dataset)
    write_index(dataset)
    write_views(dataset, recipe)
    newest = max((newest_change_ns(dataset, stage) for stage in recorded_stages(dataset)), default=0)
    if not dataset.report.exists() or dataset.report.stat().st_mtime_ns < newest:
        report_on(dataset, recipe)
    push_rest(dataset)


def push_rest(dataset: DatasetDir) -> None:
    """Writes files outside shards to S3, except metadata.duckdb, which names files of this machine."""
    storage = storage_of(dataset)
    files = (dataset.packed_tar(0).with_name("index.json"), dataset.latents_info, dataset.report)
    storage.push_files(path for path in files if path.exists())
    storage.push_folder(dataset.report.with_name("pictures"))


def report_on(dataset: DatasetDir, recipe: Recipe) -> Path:
    """Writes report.html and its images from the dataset's views; raises `UserError` before the build has decisions."""
    # Lazy, so that a build with nothing to do does not wait for matplotlib and jinja2.
    from filters.inspect.shown_part import narrow
    from sdtrain.report.page import Report, write_report

    report = Report(
        title=f"Dataset {recipe.name}",
        lead=f"{recipe.description}; imported from {recipe.source.path}" if recipe.source else recipe.description,
        dataset=dataset,
        limits=limits_of(recipe),
        thresholds=list(rule_thresholds(recipe)),
        prepare=lambda connection: prepare(connection, [recipe.select.metadata]),
        narrow=partial(narrow, dataset=dataset, recipe=recipe),
        scores_note=scores_note(recipe),
        warn=partial(heavy_losses, recipe=recipe),
    )
    try:
        return write_report(report, dataset.report)
    except duckdb.IOException as error:
        raise UserError(
            f"The report needs tables that are not where the views of {dataset.root} look for them "
            f"({first_line(error)}). If the dataset was moved, run `sdtrain views {dataset.root}`; otherwise run the "
            "build again."
        ) from error


def scores_note(recipe: Recipe) -> str:
    """Warns of scores from untrained networks, as in the demo; else empty."""
    weights = {name: getattr(recipe.score, f"{name}_weights") for name in NETWORKS}
    random = [name for name, given in weights.items() if given and given.startswith((RANDOM, RANDOM_FULL))]
    if not random:
        return ""
    decides = " The metadata decides." if recipe.decide.decide_by == "metadata" else ""
    return f"Random weights, here those of {', '.join(random)}, give scores that mean nothing.{decides}"


def limits_of(recipe: Recipe) -> dict[str, float]:
    """Returns rule limits that a diagram can draw as lines; earlier decisions come first."""
    rules = recipe.decide.rules | recipe.select.rules
    return {name: value for name, value in rules.items() if isinstance(value, float)}


def rule_thresholds(recipe: Recipe) -> Iterator[RuleThreshold]:
    """Yields rule thresholds with their columns, for showing images near them; the metadata's first."""
    from sdtrain.report.examples import RuleThreshold

    for stage, rules in (("select", recipe.select.rules), ("decide", recipe.decide.rules)):
        for name, limit in rules.items():
            if isinstance(limit, float):
                item = _item(RULES[name], stage == "select", recipe)
                yield RuleThreshold(name, stage, RULES[name].column, item, limit)


def _item(rule: Rule, is_select: bool, recipe: Recipe) -> str:
    if rule.stage is not None:
        views = {stage.name: stage.table.view for stage in pipeline.STAGES if stage.table}
        column = stage_item(rule, "m").partition(" AS ")[0]
        return f'(SELECT any_value({column}) FROM "{views[rule.stage]}" m WHERE m.uid = s.uid) AS {rule.column}'  # noqa: S608
    return select_item(rule.column) if is_select else decide_item(rule.column, recipe.decide.decide_by)
