"""The pipeline from metadata to latents: its stages in order. A new stage is one folder and its name here."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from filters.ask.stage import ASK
from filters.caption.stage import CAPTION
from filters.decide.stage import DECIDE
from filters.dedup import DEDUP
from filters.recipe import Recipe
from filters.rules import RULES
from filters.score.stage import SCORE
from filters.select.stage import SELECT
from sdtrain.dataset.stage import Stage
from sdtrain.download.stage import DOWNLOAD
from sdtrain.encode.stage import ENCODE
from sdtrain.pack.stage import PACK

OTHER_VIEWS: dict[str, str] = {
    "metadata": "Every row of the metadata that the recipe names, under one set of column names",
    "kept": "Kept samples with caption, LAION's scores and sizes",
    "drops": "Selected rows that were dropped: at which stage and why",
    "score_pairs": "LAION's scores beside ours, for every image that could be decoded",
    "hosts": "Hosts, how many URLs of each were tried and how many failed",
    "remarks": "The published size of the subset beside ours, and how odd metadata was handled",
    "funnel": "From metadata rows to kept samples: what each reason dropped and how many remain",
    "stages": "What each stage did with each shard, in how many seconds, and the bytes it wrote",
}
"""Views of metadata.duckdb that are of no single stage -> what their rows are."""


def in_order(*stages: Stage[Recipe]) -> tuple[Stage[Recipe], ...]:
    """Returns the stages; ValueError if one names a later one, or two share a name or view, `OTHER_VIEWS` included.

    ValueError also if a rule looks at a column that no stage before the decision has.
    """
    known = set[str]()
    for stage in stages:
        known.add(stage.name)
        if unknown := {*stage.inputs, *filter(None, [stage.planned_by])} - known:
            raise ValueError(f"stage '{stage.name}' reads {', '.join(sorted(unknown))}, which is no stage before it")
    _refuse_twice([stage.name for stage in stages], "two stages have the name")
    views = [stage.table.view.lower() for stage in stages if stage.table]  # as DuckDB compares names
    _refuse_twice([*views, *OTHER_VIEWS], "metadata.duckdb would have two views")
    _check_rules({stage.name: stage for stage in itertools.takewhile(lambda stage: stage is not DECIDE, stages)})
    return stages


def _check_rules(undecided: Mapping[str, Stage[Recipe]]) -> None:
    for name, rule in RULES.items():
        if rule.stage is None:
            continue
        table = undecided[rule.stage].table if rule.stage in undecided else None
        if table is None or rule.column not in table.columns:
            raise ValueError(
                f"rule '{name}' looks at '{rule.column}' of stage '{rule.stage}', and no stage before '{DECIDE.name}' "
                "has a table with that column"
            )


def _refuse_twice(names: Sequence[str], message: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{message} '{name}'")


def stages_of(recipe: Recipe) -> tuple[Stage[Recipe], ...]:
    """Returns the stages that a recipe asks for, in order."""
    return tuple(stage for stage in STAGES if stage.is_on(recipe))


# Users say `pipeline.STAGES`: the list can then be changed in one place.
STAGES = in_order(SELECT, DOWNLOAD, SCORE, DEDUP, CAPTION, ASK, DECIDE, PACK, ENCODE)
