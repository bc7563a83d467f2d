"""Finds samples that a model was trained on and that were removed from its data afterwards: they stay open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdtrain.exposure.exposures import Exposures, find_exposures
from sdtrain.exposure.located import locate_removed
from sdtrain.exposure.retraining import Retraining, retraining


@dataclass(frozen=True)
class RunUses:
    """What one run of the chain saw of them; steps count from 0."""

    run: str
    num_samples: int
    num_uses: int
    first_step: int
    last_step: int


@dataclass(frozen=True)
class OpenRemovals:
    """The samples that training saw and that were removed since.

    `cost` is that of a model without them, None if there are none; `remarks` say what is not known.
    """

    num_samples: int
    runs: Sequence[RunUses]
    cost: Retraining | None
    remarks: Sequence[str]


def open_removals(run: Path) -> OpenRemovals:
    """Those of a run and of the runs that it descends from; UserError if one of their records is damaged."""
    exposures = find_exposures(run, locate_removed)
    runs = [_uses(exposures, number) for number in np.unique(exposures.uses.runs).tolist()]
    return OpenRemovals(exposures.num_used, runs, retraining(exposures), exposures.remarks)


def _uses(exposures: Exposures, number: int) -> RunUses:
    here = exposures.uses.runs == number
    steps, samples = exposures.uses.steps[here], exposures.uses.samples[here]
    name = str(exposures.chain[number].run)
    return RunUses(name, len(np.unique(samples)), len(steps), int(steps.min()), int(steps.max()))
