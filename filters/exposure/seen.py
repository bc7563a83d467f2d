"""Tells which known runs have seen what a removal takes out, and what training them again would cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filters.exposure.find import Search
from sdtrain.dataset.layout import DatasetDir
from sdtrain.errors import UserError
from sdtrain.exposure.exposures import find_exposures
from sdtrain.exposure.known_runs import KnownRun, known_runs
from sdtrain.exposure.retraining import Retraining, retraining
from sdtrain.exposure.trained import at_hand
from sdtrain.loading.sample_record import Stage


@dataclass(frozen=True)
class SeenBy:
    """What one run has seen of the samples.

    `problem` says why that is not known; `remarks` limit what is.
    """

    known: KnownRun
    num_samples: int = 0
    num_uses: int = 0
    cost: Retraining | None = None
    remarks: tuple[str, ...] = ()
    problem: str = ""

    def sentences(self) -> Iterator[str]:
        """The same in words."""
        if self.problem:
            yield f"{self.known.run}: {self.problem}"
            return
        if self.cost is None:
            yield f"{self.known.run} has used none of these samples."
        else:
            used = f"{self.known.run} has used {self.num_samples:,} of these samples, {self.num_uses:,} times."
            yield f"{used} {self.cost.sentence()}"
        yield from self.remarks

    def row(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "run": str(self.known.run),
            "host": self.known.host,
            "num_samples": self.num_samples,
            "num_uses": self.num_uses,
            "retraining": self.cost.row() if self.cost else None,
            "remarks": [*self.remarks, *([self.problem] if self.problem else [])],
        }


def runs_that_saw(dataset: DatasetDir, uids: Sequence[str], others: Sequence[Path] = ()) -> list[SeenBy]:
    """Asks the runs known to a dataset, and `others`, for samples that are still there."""
    search = Search("uid", uids)

    def opened(name: str, stage: Stage) -> DatasetDir:
        found = at_hand(name, stage)
        return dataset if found.root == dataset.root else found

    found = []
    for known in known_runs(dataset, others):
        if not known.is_at_hand:
            problem = f"trained on this dataset on {known.host}, and is not here: ask it with `sdtrain exposed` there."
            found.append(SeenBy(known, problem=problem))
            continue
        try:
            exposures = find_exposures(known.run, search, opened)
            cost = retraining(exposures)
            counts = exposures.num_used, len(exposures.uses)
            found.append(SeenBy(known, *counts, cost, tuple(exposures.remarks)))
        except UserError as error:
            found.append(SeenBy(known, problem=str(error)))
    return found
