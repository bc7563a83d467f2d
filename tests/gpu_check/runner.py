"""Runs stages one after the other within a budget, each in a process tree of its own."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.support.process_tree import run_tree
from tests.gpu_check.record import LOG, Record
from tests.gpu_check.stage import Limits, Outcome, Stage

_GRACE_S = 3.0
_ENDING_S = 8.0
"""For ending a stage that has had its time, with all of its processes."""


class Runner:
    """A check in progress.

    Args:
        stages: in their order.
        folder: for the result.
        budget_s: seconds for all of them.
        is_small: there is no GPU.
        about: command, start and budget, as they are written.
    """

    def __init__(self, stages: Sequence[Stage], folder: Path, budget_s: float, is_small: bool, about: dict[str, Any]):
        self._stages, self._is_small = stages, is_small
        self._end = time.monotonic() + budget_s
        self._record = Record(folder, about, [])

    def run(self) -> list[Outcome]:
        """Runs what fits; the result on disk is current after every stage."""
        self._record.write()
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
            for position, stage in enumerate(self._stages):
                outcome = self._begin(stage, self._seconds_for(position))
                self._record.outcomes.append(outcome)
                if outcome.status == "running":
                    self._run(stage, outcome, Path(work))
                self._record.write()
                print(f"{outcome.name:10} {outcome.status:16} {outcome.seconds:7.1f} s  {outcome.title}", flush=True)
        return self._record.outcomes

    def _limits(self, stage: Stage) -> Limits:
        return stage.small if self._is_small else stage.on_gpu

    def _seconds_for(self, position: int) -> float:
        """Seconds that a stage may take, so that as many later ones as possible have their least; 0 if it has not."""
        left, limits = self._end - time.monotonic(), self._limits(self._stages[position])
        if left < limits.least_s:
            return 0.0
        spare = left - limits.least_s - _ENDING_S
        for later in self._stages[position + 1 :]:
            spare -= self._limits(later).least_s if self._limits(later).least_s <= spare else 0.0
        return min(limits.most_s, limits.least_s + max(0.0, spare))

    def _begin(self, stage: Stage, seconds: float) -> Outcome:
        outcome = Outcome(stage.name, stage.title, "running", limit_s=round(seconds, 1))
        if missing := stage.missing():
            outcome.status, outcome.problem = "modules missing", f"not installed: {', '.join(missing)}"
        elif not seconds:
            least, left = self._limits(stage).least_s, self._end - time.monotonic()
            outcome.status, outcome.problem = "skipped", f"needs {least:.0f} s, and {left:.0f} s are left of the budget"
        return outcome

    def _run(self, stage: Stage, outcome: Outcome, work: Path) -> None:
        started, figures = time.monotonic(), work / f"{stage.name}.json"

        def update(line: str = "") -> None:
            if line.startswith("recorded "):
                outcome.figures, outcome.seconds = _read(figures)["figures"], round(time.monotonic() - started, 1)
                self._record.write()

        try:
            code = run_tree(
                self._command(stage, outcome, figures, work),
                self._record.folder / LOG,
                update,
                _environment(work),
                _GRACE_S,
                outcome.limit_s or 0.0,
            )
            _conclude(outcome, _read(figures), code)
        except TimeoutError:
            outcome.status, outcome.problem = (
                "timed out",
                f"ended after {outcome.limit_s} s; {LOG} says how far it came",
            )
            outcome.figures = _read(figures).get("figures", {})
        outcome.seconds = round(time.monotonic() - started, 1)

    def _command(self, stage: Stage, outcome: Outcome, figures: Path, work: Path) -> list[str | Path]:
        arguments = [stage.target, figures, work, self._record.folder, str(outcome.limit_s), str(os.getpid())]
        small = ["--small"] if self._is_small else []
        return [sys.executable, "-m", "tests.gpu_check.child", *arguments, *small]


def _environment(work: Path) -> dict[str, str]:
    """Compiled kernels are kept from stage to stage."""
    return {
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TRITON_CACHE_DIR": str(work / "triton"),
    }


def _conclude(outcome: Outcome, ended: dict[str, Any], code: int) -> None:
    outcome.figures, outcome.problem = ended.get("figures", {}), ended.get("problem")
    if ended.get("missing"):
        outcome.status = "modules missing"
    elif code == 0 and ended.get("has_ended") and not outcome.problem:
        outcome.status = "passed"
    else:
        outcome.status = "failed"
        outcome.problem = outcome.problem or f"its process ended with code {code}; {LOG} holds what it printed"


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}
