"""Other thresholds for a finished dataset: preview or decide again, in seconds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from filters.decide.funnel import FunnelRow, Stages, funnel
from filters.decide.stage import DECIDE, decide, report_of
from filters.recipe import Recipe
from filters.recipe_record import read_recipe, record_recipe
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import read_entry
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import clear_leftovers, run_batch
from sdtrain.errors import UserError
from sdtrain.settings import parse_settings

_COMPARISON = re.compile(r"\s*([^<>=!]+?)\s*(?:=\s*)?((?:[<>]=?|[=!]=).+)")


def parse_rules(texts: Iterable[str]) -> dict[str, Any]:
    """Parses texts into a recipe's rules: `name=value`, with values as in YAML, or `name<=2` for a carried column.

    UserError for another form.
    """
    rules = {}
    for text in texts:
        compared = _COMPARISON.fullmatch(text)
        if compared:
            rules[compared[1]] = compared[2].strip()
            continue
        name, equals, value = text.partition("=")
        try:
            rules[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals or not name.strip():
            raise UserError(f"--rule {text!r}: write name=value, such as --rule min_side=512.")
    return rules


def with_decide_rules(recipe: Recipe, rules: Mapping[str, Any], decide_by: str | None = None) -> Recipe:
    """Returns the recipe with `rules` merged into `decide`, in place or appended; raises `UserError` if invalid."""
    content: dict[str, Any] = recipe.model_dump()
    content["decide"]["rules"] |= {name: value for name, value in rules.items() if value is not None}
    content["decide"]["decide_by"] = decide_by or recipe.decide.decide_by
    return parse_settings(Recipe, content, "command line")


def compare(dataset: DatasetDir, recipe: Recipe, stages: Stages) -> list[dict[str, object]]:
    """Compares the current funnel with that under `recipe`, reason by reason; writes nothing.

    UserError if a stage before `decide` is not finished, or nothing would be kept.
    """
    stages = stages[: stages.index(DECIDE) + 1]
    after = funnel(dataset, recipe, stages, _decided(dataset, recipe))
    before = funnel(dataset, read_recipe(dataset), stages) if read_entry(dataset, "decide", 0) else []
    old, new = ({(row["stage"], row["reason"]): row for row in rows} for rows in (before, after))
    # Reasons of the old funnel only go last in their stage, which for all of them is `decide`.
    shown = [_beside(key, old.get(key), new.get(key)) for key in dict.fromkeys([*new, *old]) if key[1]]
    kept: dict[str, object] = {"stage": "", "reason": "kept", "meaning": "samples to be packed"}
    shown = [row for row in shown if row["before"] or row["now"]]
    return [*shown, kept | {"before": _kept(before), "now": _kept(after)}]


def decide_again(dataset: DatasetDir, recipe: Recipe) -> list[str]:
    """Records `recipe` and decides by it; returns its differences from the previous recipe.

    UserError, with nothing changed, if a stage before `decide` is not finished or nothing would be kept.
    """
    _decided(dataset, recipe)
    changes = record_recipe(dataset, recipe)
    clear_leftovers(DECIDE, dataset)
    run_batch(DECIDE, dataset, recipe, [0])
    return changes


def _decided(dataset: DatasetDir, recipe: Recipe) -> ShardReport:
    DECIDE.fingerprint(dataset, recipe, 0)  # fails if an earlier stage is not finished
    return report_of(dataset, decide(dataset, recipe))


def _beside(key: tuple[str, str], old: FunnelRow | None, new: FunnelRow | None) -> dict[str, object]:
    meaning = (new or old or {"meaning": ""})["meaning"]
    return {"stage": key[0], "reason": key[1], "meaning": meaning, "before": _count(old), "now": _count(new)}


def _count(row: FunnelRow | None) -> int:
    return row["dropped"] if row else 0


def _kept(rows: list[FunnelRow]) -> int | str:
    return rows[-1]["remaining"] if rows else "-"
