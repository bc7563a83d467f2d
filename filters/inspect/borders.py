"""What a rule looks at, so that images near its limit can be shown."""

from __future__ import annotations

from collections.abc import Iterator

from filters.columns import SCORE_COLUMNS
from filters.recipe import Recipe
from filters.rules import DERIVED, RULES, derived_sql
from sdtrain.report.examples import Border


def borders(recipe: Recipe) -> Iterator[Border]:
    """The limits of a recipe's rules, those of the metadata first."""
    for stage, rules in (("select", recipe.select.rules), ("keep", recipe.keep.rules)):
        for name, limit in rules.items():
            if isinstance(limit, float):
                column = RULES[name].column
                item = _in_selection(column) if stage == "select" else _in_keep(column, recipe.keep.decide_by)
                yield Border(name, stage, column, item, limit)


def _in_selection(column: str) -> str:
    if column in DERIVED:
        return derived_sql((column,), "s.width", "s.height", "s.caption")
    return f"s.{column}::DOUBLE AS {column}"


def _in_keep(column: str, decide_by: str) -> str:
    if column in DERIVED:
        return derived_sql((column,), "i.original_width", "i.original_height", "s.caption")
    origin = "s" if column in SCORE_COLUMNS and decide_by == "metadata" else "c"
    return f"{origin}.{column}::DOUBLE AS {column}"
