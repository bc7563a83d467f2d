"""Rule thresholds and their columns, for showing images near the limits."""

from __future__ import annotations

from collections.abc import Iterator

from filters.recipe import Recipe
from filters.rules import RULES, decide_item, select_item
from sdtrain.report.examples import RuleThreshold


def borders(recipe: Recipe) -> Iterator[RuleThreshold]:
    """Yields a recipe's rule thresholds, the metadata's first."""
    for stage, rules in (("select", recipe.select.rules), ("decide", recipe.decide.rules)):
        for name, limit in rules.items():
            if isinstance(limit, float):
                column = RULES[name].column
                item = select_item(column) if stage == "select" else decide_item(column, recipe.decide.decide_by)
                yield RuleThreshold(name, stage, column, item, limit)
