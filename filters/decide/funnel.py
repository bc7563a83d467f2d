"""The funnel from metadata rows to kept samples: drops by reason, checked to add up."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypedDict

from filters.recipe import Recipe
from filters.rules import RuleValue, explain
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import require_entry, selection
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import Drops, Stage, current_entries
from sdtrain.errors import UserError
from sdtrain.models.weights import RANDOM, RANDOM_FULL

Stages = Sequence[Stage[Recipe]]


class FunnelRow(TypedDict):
    """The drops of one reason; the first row, the metadata's, has none."""

    stage: str
    reason: str
    meaning: str
    dropped: int
    remaining: int


def funnel(dataset: DatasetDir, recipe: Recipe, stages: Stages, decided: ShardReport | None = None) -> list[FunnelRow]:
    """Returns drops by stage and reason, from all metadata rows to the kept samples.

    `stages` are the pipeline's, in order; `decided` replaces the recorded decisions. UserError if a stage that drops
    samples is not finished, or the counts of two stages do not match.
    """
    num_rows = selection(dataset).num_in
    meaning = "images of the source" if recipe.source else "rows of the metadata"
    rows = [FunnelRow(stage="select", reason="", meaning=meaning, dropped=0, remaining=num_rows)]
    dropped_before = Counter[str]()
    for stage in stages:
        if stage.drops is None:
            continue
        if decided and decided.stage == stage.name:
            dropped, num_out = Counter(decided.dropped), decided.num_out
        else:
            dropped, num_out = _counts(stage, dataset, recipe)
        if stage.drops.repeats:
            dropped.subtract(dropped_before)
        elif stage is not stages[0]:  # the first stage's drops are not selected, so no later stage counts them
            dropped_before += dropped
        _append(rows, stage.name, dropped, stage.drops.rules(recipe), stage.drops, num_out)
    return rows


# As in the demo.
_UNTRAINED = "to {network}'s random weights nearly all images are alike, so what {level} would drop means nothing here"


def remarks(dataset: DatasetDir, recipe: Recipe, stages: Stages) -> list[str]:
    """Returns the subset's published size and remarks on odd input; raises `UserError` before a selection."""
    selected = selection(dataset)
    kind = "imported images" if recipe.source else "rows"
    ours = f"{selected.num_out:,} of {selected.num_in:,} {kind} selected"
    published = f"; published: {recipe.expected_rows}" if recipe.expected_rows else ""
    noted = [note for stage in stages for note in current_entries(stage, dataset, recipe).listed("notes")]
    compared = (("copied", "SSCD", recipe.score.sscd_weights), ("semantic", "CLIP", recipe.score.clip_weights))
    untrained = [
        _UNTRAINED.format(network=network, level=level)
        for level, network, weights in compared
        if (weights or "").startswith((RANDOM, RANDOM_FULL)) and any(re.search(rf"{level} \d", note) for note in noted)
    ]
    return [ours + published, *dict.fromkeys([*noted, *untrained])]


def _counts(stage: Stage[Recipe], dataset: DatasetDir, recipe: Recipe) -> tuple[Counter[str], int]:
    num_shards = stage.num_shards(dataset, recipe) or 1
    finished = current_entries(stage, dataset, recipe)
    if len(finished) < num_shards:
        missing = next(shard for shard in range(num_shards) if finished.get(shard) is None)
        require_entry(dataset, stage.name, missing)
    return finished.dropped(), finished.total("num_out")


def _append(
    rows: list[FunnelRow],
    stage: str,
    dropped: Counter[str],
    rules: Mapping[str, RuleValue],
    drops: Drops[Recipe],
    num_out: int,
) -> None:
    for reason in sorted(filter(dropped.get, dropped), key=lambda reason: _place(reason, rules, drops)):
        remaining = rows[-1]["remaining"] - dropped[reason]
        meaning = explain(reason, rules) if reason in rules else drops.last.get(reason) or drops.explain(reason)
        rows.append(
            FunnelRow(stage=stage, reason=reason, meaning=meaning, dropped=dropped[reason], remaining=remaining)
        )
    if rows[-1]["remaining"] != num_out or any(count < 0 for count in dropped.values()):
        raise UserError(
            f"The counts do not add up: after stage '{stage}' {rows[-1]['remaining']:,} samples should be left, but it "
            f"reports {num_out:,}. Its input was rebuilt since; run the build again to bring it up to date."
        )


def _place(reason: str, rules: Mapping[str, RuleValue], drops: Drops[Recipe]) -> tuple[int, int, str]:
    if reason in drops.last:
        return 3, list(drops.last).index(reason), reason
    return (1, list(rules).index(reason), reason) if reason in rules else (2, 0, reason)
