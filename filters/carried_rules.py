"""Conditions on columns that `select.carry` names, written as comparisons: `num_faces: "<= 2"`."""

from __future__ import annotations

import re
from typing import Any

_COMPARISON = re.compile(r"\s*(<=|>=|==|!=|<|>|=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
_SQL = {"==": "=", "!=": "<>"}
WANTED = 'a comparison with numbers, such as "<= 2" or ">= 0.5 and < 1", a list of words, or true'


def is_for_carried(value: Any) -> bool:
    """Returns whether the rule of a carried column may have this value."""
    if isinstance(value, str):
        return all(map(_COMPARISON.fullmatch, value.split(" and ")))
    is_words = isinstance(value, list) and bool(value) and all(isinstance(word, str) for word in value)
    return is_words or isinstance(value, bool)


def carried_condition(name: str, value: bool | float | str | list[str]) -> tuple[str, str, type]:
    """Returns the SQL condition, the meaning of a failure and the value's kind, as `filters.rules.Rule` has them.

    A value that is no number fails a comparison. Words are compared as text, in either case.
    """
    column = f'"{name}"'
    if isinstance(value, list):
        return f"list_contains(?, lower({column}::VARCHAR))", f"{name} not one of {{value}}", list
    if isinstance(value, str):
        return _compared(column, value), f"{name} not {{value}}", str
    return f"coalesce(TRY_CAST({column} AS BOOLEAN), false)", f"{name} not true", bool


def _compared(column: str, value: str) -> str:
    # Only an operator of the list, and a number as Python prints it, get into the SQL.
    tests = [found.groups() for part in value.split(" and ") if (found := _COMPARISON.fullmatch(part))]
    number = f"TRY_CAST({column} AS DOUBLE)"
    conditions = " AND ".join(f"{number} {_SQL.get(sign, sign)} {float(limit)!r}::DOUBLE" for sign, limit in tests)
    return f"coalesce({conditions}, false)"
