"""Checks made before any work, which report all problems at once, with what to do about each."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from sdtrain.errors import UserError

ROOM_IS_SURELY_TOO_SMALL = 0.5
"""Of an estimate of disk usage; estimates rest on assumed rates, so that less than all of it is only warned of."""


@dataclass(frozen=True)
class Check:
    """One thing that a run needs.

    Attributes:
        name: the setting that names it.
        open: opens it as the run will, and says in a few words what it is; raises UserError if it does not fit.
    """

    name: str
    open: Callable[[], str]


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        name: of the check.
        text: what was found, or what is wrong.
        is_problem: whether the run would fail.
    """

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
    """Runs all checks before any work begins.

    Raises:
        UserError: names all that failed.
    """
    found = findings(checks)
    problems = list({finding.text: finding for finding in found if finding.is_problem}.values())
    if len(problems) == 1:
        raise UserError(problems[0].text)
    if problems:
        lines = "\n".join(f"- {finding.name}: {finding.text}" for finding in problems)
        raise UserError(f"{len(problems)} things that this run needs are missing or wrong:\n{lines}")
    return found


def check_writable(folder: Path) -> str:
    """Writes a file into `folder`, or into the nearest folder above it that exists, and deletes it.

    Raises:
        UserError: it cannot be written.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}). Choose another --output.") from error
    return f"{folder} can be written"


def check_room(folder: Path, wanted_bytes: float, what: str, surely: float = ROOM_IS_SURELY_TOO_SMALL) -> str:
    """Compares an estimate of what will be written with what is free.

    Args:
        folder: where it goes; it need not exist yet.
        wanted_bytes: the estimate.
        what: takes the room, for the sentence.
        surely: share of the estimate below which it is an error and no warning.

    Raises:
        UserError: far too little is free.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    said = f"{what} will take about {in_bytes(wanted_bytes)}, and {in_bytes(free)} are free in {place}"
    if free < surely * wanted_bytes:
        raise UserError(f"{said}. Choose another --output, or do less.")
    return said + (" (warning: that may be too little)" if free < wanted_bytes else "")


def in_bytes(number: float) -> str:
    """A size for people, as in "3.2 GB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError("unreachable")
