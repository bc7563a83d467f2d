"""Rules in words: questions about an image, which a network answers with the probability of yes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sdtrain.errors import UserError

COLUMN = "answers"
"""Of the stage ASK: question -> probability of yes."""
_MOST = 0.5
_FORM = re.compile(r"(<=|>=) ([0-9]*\.?[0-9]+(?:e-?[0-9]+)?) (\S.*)", re.S)
_LIMIT, _QUESTION = (f"regexp_extract(q, '(?s)^.= ([0-9.e-]+) (.*)$', {group})" for group in (1, 2))
_CHANCE = f"{COLUMN}[{_QUESTION}]"
# An image about which there is no answer fails, as wherever a rule finds no value.
SQL = (
    f"len(list_filter(?, lambda q: NOT coalesce(CASE WHEN q[:2] = '<=' THEN {_CHANCE} <= {_LIMIT}::DOUBLE "
    f"ELSE {_CHANCE} >= {_LIMIT}::DOUBLE END, false))) = 0"
)
_WANTED = (
    "a question, which is to be answered no, or a list of {question: ..., max: 0.5} or {question: ..., min: 0.5}, the "
    "probability of yes being at most, or at least, that"
)


def parse_questions(value: Any) -> list[str]:
    """Normalises the rule's value to lines like "<= 0.5 Does it show text?", which it also accepts.

    UserError for anything else.
    """
    return [_line(one) for one in (value if isinstance(value, list) and value else [value])]


def questions_of(lines: Sequence[str]) -> list[str]:
    """The questions of a normalised value, each once."""
    return list(dict.fromkeys(found[3] for line in lines if (found := _FORM.fullmatch(line))))


def _line(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value if _FORM.fullmatch(value) else f"<= {_MOST} {value.strip()}"
    if isinstance(value, dict) and isinstance(value.get("question"), str) and value["question"].strip():
        limits = {name: limit for name, limit in value.items() if name != "question"} or {"max": _MOST}
        (name, limit), *others = limits.items()
        is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
        if not others and name in ("max", "min") and is_number and 0 <= limit <= 1:
            return f"{'<=' if name == 'max' else '>='} {float(limit)!r} {value['question'].strip()}"
    raise UserError(f"rule 'ask' wants {_WANTED}; not {value!r}")
