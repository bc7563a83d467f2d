"""Errors of DuckDB's readers in the words of a user: the file, the line and what is wrong there."""

from __future__ import annotations

import re
from typing import Any

_AT_LINE = re.compile(r"CSV Error on Line: (\d+)")
_FILE = re.compile(r"^\s*file = (.+)$", re.MULTILINE)
_COUNTS = re.compile(r"Expected Number of Columns: (\d+) Found: (\d+)")
_WRONG = {
    "unterminated quote": "a quoted value does not end with its double quote (write a quote inside as two)",
    "invalid unicode": "the text is not UTF-8 (convert it: iconv -f OLD -t UTF-8)",
    "not utf-8 encoded": "the text is not UTF-8 (convert it: iconv -f OLD -t UTF-8)",
    "maximum line size": "the line is too long for a row; is a double quote missing?",
    "invalid state": "lines end in different ways (some with \\r\\n, some with \\n), or a double quote is missing",
}


def first_line(error: Any) -> str:
    """Returns the first line of a DuckDB error; the rest may be advice for SQL authors."""
    return str(error).strip().partition("\n")[0]


def fault(error: Any) -> str:
    """Returns what a DuckDB error says of a row in CSV as "FILE, line N: ..."; of all others the first line."""
    text = str(error)
    line, file = _AT_LINE.search(text), _FILE.search(text)
    reason = _reason(text)
    if not reason or not file:
        return first_line(error)
    return f"{file[1]}{f', line {line[1]}' if line else ''}: {reason}"


def _reason(text: str) -> str | None:
    counts = _COUNTS.search(text)
    if counts:
        return (
            f"{counts[2]} values, where the first line names {counts[1]} (a value that holds the separator or a line "
            "break needs double quotes)"
        )
    return next((words for sign, words in _WRONG.items() if sign in text.lower()), None)
