"""CSV files with a row for some of the optimizer steps, which a resumed run goes on with."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from sdtrain.dataset.files import publish


class StepTable:
    """A CSV file whose first column is the optimizer step.

    Attributes:
        path: the file.
        columns: its header, "step" first; files of an earlier version may have fewer.
    """

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.columns = path, tuple(columns)

    def rows(self) -> list[dict[str, str]]:
        """The rows so far; a last row cut short by a crash is left out."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]

    def cut(self, step: int) -> list[dict[str, str]]:
        """Forgets what came after `step`; returns the rows that stay."""
        rows = [row for row in self.rows() if int(row["step"]) <= step]
        with publish(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        return rows

    def add(self, **row: float | str | None) -> None:
        """Appends one row; None leaves its column empty."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)
