"""Predicate pushdown: conditions on plain Parquet columns that rules imply, by which DuckDB skips row groups."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from filters.rules import RULES, RuleValue, active_rules, lower_case

_WHOLE = {"TINYINT": 8, "SMALLINT": 16, "INTEGER": 32, "BIGINT": 64}
Value = float | int | list[str]


@dataclass(frozen=True)
class Pushdown:
    """Rules whose conditions are pushed down into the Parquet reader.

    Attributes:
        rules: the recipe's.
        null_passes: our names of columns where NULL does not drop a row, because a missing score is decided on later
            or a join may still fill it.
    """

    rules: Mapping[str, RuleValue]
    null_passes: Collection[str] = ()


def pushdown_sql(pushdown: Pushdown, columns: Mapping[str, str], types: Mapping[str, str]) -> tuple[str, list[Value]]:
    """A condition that holds for every row which the rules let pass, and the values to bind.

    It may hold for others too: whoever uses it must still ask the rules.

    Args:
        pushdown: the rules.
        columns: our name -> the SQL of the plain column, for those that the files have.
        types: our name -> its DuckDB type in the files.
    """
    conditions, values = [], list[Value]()
    for name in active_rules(pushdown.rules):
        for column, operator in RULES[name].pushdown:
            if column != RULES[name].column in pushdown.null_passes:
                continue  # it follows from several columns, which may have values that give NULL together
            null_passes = not {column, RULES[name].column}.isdisjoint(pushdown.null_passes)
            if column not in columns:
                conditions += [] if null_passes else ["false"]
                continue
            bounds = _bounds(columns[column], types[column], operator, pushdown.rules[name])
            for condition, value in bounds:
                conditions.append(_or_missing(condition, columns[column], types[column]) if null_passes else condition)
                values.append(value)
    return " AND ".join(conditions) or "true", values


def _or_missing(condition: str, column: str, kind: str) -> str:
    # NaN and infinity count as missing.
    infinite = f" OR NOT isfinite({column})" if kind in ("FLOAT", "DOUBLE") else ""
    return f"({condition} OR {column} IS NULL{infinite})"


def _bounds(column: str, kind: str, operator: str, value: RuleValue) -> Iterator[tuple[str, Value]]:
    """At most one condition and its value: none for a type that cannot be compared as it is."""
    if isinstance(value, list):
        if kind == "VARCHAR":
            yield f"list_contains(?, lower({column}))", lower_case(value)
    elif kind in _WHOLE:
        border = _nearest_whole(operator, value)
        limit = 2 ** (_WHOLE[kind] - 1)
        inside = max(-limit, min(limit - 1, border))
        # Beyond what the type can hold nothing passes: more than its largest number, or less than its smallest.
        beyond = border > inside if operator[0] == ">" else border < inside
        yield f"{column} {operator[0]}{'' if beyond else '='} CAST(? AS {kind})", inside
    elif kind in ("FLOAT", "DOUBLE"):
        yield f"{column} {operator[0]}= CAST(? AS {kind})", _nearest_float(operator, value, kind)


def _nearest_whole(operator: str, value: float) -> int:
    """The whole number where `operator value` begins, so that a comparison with "or equal" means the same."""
    borders = {">=": math.ceil(value), ">": math.floor(value) + 1, "<=": math.floor(value), "<": math.ceil(value) - 1}
    return borders[operator]


def _nearest_float(operator: str, value: float, kind: str) -> float:
    """The same among the numbers that the type can hold: 0.3 is none of FLOAT's."""
    number = np.float32(value) if kind == "FLOAT" else np.float64(value)
    inside = {">=": np.greater_equal, ">": np.greater, "<=": np.less_equal, "<": np.less}[operator]
    # Compared as doubles, for the rule sees the column as one.
    if not inside(np.float64(number), value):
        number = np.nextafter(number, number.dtype.type(math.inf if operator[0] == ">" else -math.inf))
    return float(number)
