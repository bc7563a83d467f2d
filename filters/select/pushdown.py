"""Predicate pushdown: conditions implied by rules on plain Parquet columns let DuckDB skip row groups."""

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
    """Rules to push down into the Parquet reader.

    `null_passes` are our names of columns where NULL keeps the row: a join or a later stage may still supply the score.
    """

    rules: Mapping[str, RuleValue]
    null_passes: Collection[str] = ()


def pushdown_sql(pushdown: Pushdown, columns: Mapping[str, str], types: Mapping[str, str]) -> tuple[str, list[Value]]:
    """Returns a condition that every passing row satisfies, and the values to bind.

    Other rows may satisfy it too, so callers must still apply the rules. `columns` maps our names to the SQL of plain
    columns present in the files, `types` to their DuckDB types.
    """
    conditions, values = [], list[Value]()
    for name in active_rules(pushdown.rules):
        limit = pushdown.rules[name]
        if name not in RULES or isinstance(limit, str):  # of a carried column
            continue
        for column, operator in RULES[name].pushdown:
            if column != RULES[name].column in pushdown.null_passes:
                continue  # derived from several columns, whose values together may give NULL
            null_passes = not {column, RULES[name].column}.isdisjoint(pushdown.null_passes)
            if column not in columns:
                conditions += [] if null_passes else ["false"]
                continue
            bounds = _bounds(columns[column], types[column], operator, limit)
            for condition, value in bounds:
                conditions.append(_or_missing(condition, columns[column], types[column]) if null_passes else condition)
                values.append(value)
    return " AND ".join(conditions) or "true", values


def _or_missing(condition: str, column: str, kind: str) -> str:
    # NaN and infinity count as missing.
    infinite = f" OR NOT isfinite({column})" if kind in ("FLOAT", "DOUBLE") else ""
    return f"({condition} OR {column} IS NULL{infinite})"


def _bounds(column: str, kind: str, operator: str, value: float | list[str]) -> Iterator[tuple[str, Value]]:
    """Yields at most one condition and its value; none for a type that cannot be compared directly."""
    if isinstance(value, list):
        if kind == "VARCHAR":
            yield f"list_contains(?, lower({column}))", lower_case(value)
    elif kind in _WHOLE:
        bound = _nearest_whole(operator, value)
        limit = 2 ** (_WHOLE[kind] - 1)
        inside = max(-limit, min(limit - 1, bound))
        # Nothing passes a limit beyond the type's range.
        beyond = bound > inside if operator[0] == ">" else bound < inside
        yield f"{column} {operator[0]}{'' if beyond else '='} CAST(? AS {kind})", inside
    elif kind in ("FLOAT", "DOUBLE"):
        yield f"{column} {operator[0]}= CAST(? AS {kind})", _nearest_float(operator, value, kind)


def _nearest_whole(operator: str, value: float) -> int:
    """Returns the first whole number that satisfies `operator value`, for a comparison with "or equal"."""
    bounds = {">=": math.ceil(value), ">": math.floor(value) + 1, "<=": math.floor(value), "<": math.ceil(value) - 1}
    return bounds[operator]


def _nearest_float(operator: str, value: float, kind: str) -> float:
    """Like `_nearest_whole`, among the type's values: FLOAT cannot hold 0.3."""
    number = np.float32(value) if kind == "FLOAT" else np.float64(value)
    inside = {">=": np.greater_equal, ">": np.greater, "<=": np.less_equal, "<": np.less}[operator]
    # Compared as doubles, because the rule sees a DOUBLE column.
    if not inside(np.float64(number), value):
        number = np.nextafter(number, number.dtype.type(math.inf if operator[0] == ">" else -math.inf))
    return float(number)
