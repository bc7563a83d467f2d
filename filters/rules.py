"""The rules that a recipe can name, and their SQL."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sdtrain.errors import UserError
from sdtrain.settings import nearest


@dataclass(frozen=True)
class Rule:
    """One condition that a sample must meet.

    Attributes:
        column: the column it needs; NULL there is counted as a reason of its own.
        sql: the condition with one `?` for the recipe's value.
        meaning: what was wrong with a sample that fails it; `{value}` is the recipe's value.
    """

    column: str
    sql: str
    meaning: str


RULES: dict[str, Rule] = {
    "min_side": Rule("side", "side >= ?", "shorter side under {value} px"),
    "min_aesthetic": Rule("aesthetic", "aesthetic > ?", "aesthetic score not over {value}"),
    "max_watermark": Rule("pwatermark", "pwatermark < ?", "watermark probability not under {value}"),
    "max_unsafe": Rule("punsafe", "punsafe < ?", "unsafe probability not under {value}"),
    "min_similarity": Rule("similarity", "similarity > ?", "caption similarity not over {value}"),
    "max_aspect_ratio": Rule("aspect_ratio", "aspect_ratio <= ?", "sides differ by more than {value} times"),
    "min_caption_chars": Rule("caption_chars", "caption_chars >= ?", "caption shorter than {value} characters"),
}


def check_rules(rules: dict[str, float]) -> None:
    """Refuses rules that do not exist.

    Raises:
        UserError: names the unknown rule and the nearest known one.
    """
    for name in rules:
        if name not in RULES:
            raise UserError(f"unknown rule '{name}'.{nearest(name, list(RULES))}")


def reason_case(
    rules: dict[str, float], first: list[tuple[str, str]] | None = None, null_passes: Collection[str] = ()
) -> tuple[str, list[float]]:
    """SQL for the first reason that drops a row (NULL when it stays), and the values to bind.

    Reasons are the rules' names, or `<column>_missing` where the column is NULL. `first`
    holds (reason, condition to stay) pairs that are checked before the rules. NULL in one of
    the columns `null_passes` meets the rule.
    """
    branches = [f"WHEN NOT coalesce({stays}, false) THEN '{reason}'" for reason, stays in first or []]
    values: list[float] = []
    for name, value in rules.items():
        rule = RULES[name]
        if rule.column not in null_passes:
            branches.append(f"WHEN {rule.column} IS NULL THEN '{rule.column}_missing'")
        branches.append(f"WHEN NOT ({rule.sql}) THEN '{name}'")
        values.append(value)
    return (f"CASE {' '.join(branches)} END" if branches else "NULL::VARCHAR"), values


def explain(reason: str, rules: dict[str, float]) -> str:
    """A reason in plain words, for the funnel."""
    if reason in RULES and reason in rules:
        return RULES[reason].meaning.format(value=f"{rules[reason]:g}")
    return reason.replace("_", " ")
