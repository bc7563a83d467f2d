"""Reckons what it costs to train again without some samples, from the last checkpoint before their first use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdtrain.exposure.exposures import Exposures
from sdtrain.exposure.trained import Checkpoint, Trained
from sdtrain.impact.energy import EnergyLog
from sdtrain.impact.footprint import footprint
from sdtrain.training.run_dir import RunDir


@dataclass(frozen=True)
class Retraining:
    """The steps to repeat, of one run or of several.

    Attributes:
        first: run and step, from 0, of the first use.
        start: the checkpoint to go on from; None if none is at hand from before the first use.
        hours: by the clock, at the runs' own speed; None where a run has no log of it.
        kwh: by the runs' own records of energy; None where one has none, or does not know its GPUs' power.
    """

    first: tuple[Trained, int]
    start: Checkpoint | None
    num_steps: int
    hours: float | None
    kwh: float | None

    def sentence(self) -> str:
        """All of it in words."""
        run, step = self.first[0].run, self.first[1]
        start = "No checkpoint from before it is at hand; training again from the start"
        if self.start:
            start = (
                f"The last checkpoint before it is {self.start.path}, after {self.start.step:,} steps; going on there"
            )
        hours = "hours that no log tells" if self.hours is None else f"{self.hours:,.4g} hours at the run's own speed"
        kwh = "energy not recorded" if self.kwh is None else f"{self.kwh:,.4g} kWh by the run's own record"
        return f"First use: step {step:,} of {run}. {start}: {self.num_steps:,} steps, {hours}, {kwh}."

    def row(self) -> dict[str, Any]:
        """All of it for JSON."""
        return {
            "first_use": {"run": str(self.first[0].run), "step": self.first[1]},
            "clean_checkpoint": str(self.start.path) if self.start else None,
            "num_steps": self.num_steps,
            "hours": self.hours,
            "kwh": self.kwh,
        }


def retraining(exposures: Exposures) -> Retraining | None:
    """What it takes to have the last run's model without the samples; None if no step used any."""
    first = exposures.first()
    if first is None:
        return None
    chain = list(exposures.chain)
    start = exposures.clean_checkpoint(first)
    repeated = _repeated(chain, start)
    hours, kwh = _sum([_hours(*part) for part in repeated]), _sum([_kwh(*part) for part in repeated])
    num_steps = sum(num for _, num in repeated)
    return Retraining((chain[first[0]], first[1]), start, num_steps, hours, kwh)


def _repeated(chain: Sequence[Trained], start: Checkpoint | None) -> list[tuple[Trained, int]]:
    """The runs from the checkpoint on, and how many of their steps come after it."""
    runs = [trained.run for trained in chain]
    number, done = (runs.index(start.run), start.step) if start else (0, 0)
    return [(trained, trained.num_steps - done * (n == 0)) for n, trained in enumerate(chain[number:])]


def _sum(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _hours(trained: Trained, num_steps: int) -> float | None:
    last = (RunDir(trained.run).log.rows() or [{}])[-1]
    if not last.get("seconds") or not int(last["step"]):
        return None
    return float(last["seconds"]) / int(last["step"]) * num_steps / 3600


def _kwh(trained: Trained, num_steps: int) -> float | None:
    sessions = EnergyLog(trained.run / "energy.csv").sessions()
    steps = max((spent.step for spent in sessions), default=0)
    total = footprint(sessions, trained.config.card.gpu_watts).kwh if steps else None
    return None if total is None else total / steps * num_steps
