"""What a rule looks at, so that images near its limit can be shown."""

from __future__ import annotations

from collections.abc import Iterator

from filters.recipe import Recipe
from filters.rules import RULES, keep_item, select_item
from sdtrain.report.examples import RuleThreshold


def borders(recipe: Recipe) -> Iterator[RuleThreshold]:
    """The limits of a recipe's rules, those of the metadata first."""
    for stage, rules in (("select", recipe.select.rules), ("keep", recipe.keep.rules)):
        for name, limit in rules.items():
            if isinstance(limit, float):
                column = RULES[name].column
                item = select_item(column) if stage == "select" else keep_item(column, recipe.keep.decide_by)
                yield RuleThreshold(name, stage, column, item, limit)
