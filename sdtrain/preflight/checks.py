"""Checks made before any work, which report all problems at once, each with its remedy."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from sdtrain.errors import UserError

ROOM_IS_SURELY_TOO_SMALL = 0.5
"""Share of the estimate; estimates rest on assumed rates, so between this and all of it there is only a warning."""


@dataclass(frozen=True)
class Check:
    """A requirement of a run.

    `name` is its setting; `open` opens it as the run will, and returns a short description or raises UserError.
    """

    name: str
    open: Callable[[], str]


@dataclass(frozen=True)
class Finding:
    """The result of a check: `text` says what was found or is wrong, `is_problem` whether the run would fail."""

    name: str
    text: str
    is_problem: bool = False


def findings(checks: Iterable[Check]) -> list[Finding]:
    """Runs all checks, even after a failure."""
    found = []
    for check in checks:
        try:
            found.append(Finding(check.name, check.open()))
        except UserError as error:
            found.append(Finding(check.name, str(error), is_problem=True))
    return found


def require(checks: Iterable[Check]) -> list[Finding]:
    """Runs all checks before any work begins; UserError names all that failed."""
    found = findings(checks)
    problems = list({finding.text: finding for finding in found if finding.is_problem}.values())
    if len(problems) == 1:
        raise UserError(problems[0].text)
    if problems:
        lines = "\n".join(f"- {finding.name}: {finding.text}" for finding in problems)
        raise UserError(f"{len(problems)} things that this run needs are missing or wrong:\n{lines}")
    return found


def check_writable(folder: Path) -> str:
    """Tries to write a temporary file into `folder`, or its nearest existing parent; UserError if that fails."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}). Choose another --output.") from error
    return f"{folder} can be written"


def check_room(folder: Path, wanted_bytes: float, what: str, surely: float = ROOM_IS_SURELY_TOO_SMALL) -> str:
    """Compares an estimate of the bytes that `what` will write to `folder`, which need not exist, with the free space.

    UserError if less than the share `surely` of the estimate is free.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    said = f"{what} will take about {in_bytes(wanted_bytes)}, and {in_bytes(free)} are free in {place}"
    if free < surely * wanted_bytes:
        raise UserError(f"{said}. Choose another --output, or do less.")
    return said + (" (warning: that may be too little)" if free < wanted_bytes else "")


def in_bytes(number: float) -> str:
    """A readable size, as in "3.2 GB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError("unreachable")
