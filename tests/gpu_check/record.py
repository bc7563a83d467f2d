"""The files of a check: result.json and table.txt, each whole at every moment."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu_check.stage import Outcome

FORMAT = 1
RESULT, TABLE, LOG = "result.json", "table.txt", "log.txt"
_SHOWN = 400


def write_whole(path: Path, text: str) -> None:
    """Replaces a file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


@dataclass(frozen=True)
class Record:
    """What has happened so far, in a folder.

    Attributes:
        about: command, start and budget.
        outcomes: one for every stage that has begun or was passed over.
    """

    folder: Path
    about: dict[str, Any]
    outcomes: list[Outcome]

    def write(self) -> None:
        """Writes both files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stages = [outcome.as_json() for outcome in self.outcomes]
        write_whole(self.folder / RESULT, json.dumps({"format": FORMAT, **self.about, "stages": stages}, indent=1))
        write_whole(self.folder / TABLE, table(self.outcomes))


def read_result(folder: Path) -> dict[str, Any]:
    """The written result; empty where there is none."""
    path = folder / RESULT
    return dict(json.loads(path.read_text())) if path.exists() else {}


def table(outcomes: Sequence[Outcome]) -> str:
    """One line a stage, and its figures below."""
    lines = []
    for outcome in outcomes:
        lines.append(f"{outcome.name:10} {outcome.status:16} {outcome.seconds:7.1f} s  {outcome.title}")
        lines += [f"    {name}: {_short(value)}" for name, value in outcome.figures.items()]
        if outcome.problem:
            lines.append(f"    {_short(outcome.problem.strip().splitlines()[-1])}")
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
