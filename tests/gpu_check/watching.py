"""Watches single optimizer steps of real training: a profile of some micro-steps, and host syncs of a whole step."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.benchmarks.training_loops import CUDA, Clock, TimeUpError
from tests.gpu_check.kernels import summed

WATCHED_STATE = "sdtrain.training.state.TrainingState"
_SYNC = "called a synchronizing CUDA operation"


@dataclass
class WatchingClock(Clock):
    """After the timed steps: one whose first micro-steps are profiled, then one whose host syncs are counted.

    Attributes:
        log_every: steps with a log line, whose syncs do not count.
        num_profiled: micro-steps in the first profile.
        profile: of the first micro-steps, as `summed` gives it.
        last_profile: of the last micro-step with the optimizer step.
        syncs: number and places of host syncs in an optimizer step without a log line; None on a CPU.
    """

    log_every: int = 1
    num_profiled: int = 2
    profile: dict[str, Any] = field(default_factory=dict)
    last_profile: dict[str, Any] = field(default_factory=dict)
    syncs: dict[str, Any] | None = None
    _phase: str = "timing"
    _profiler: Any = None
    _began: float = 0.0
    _warnings: Any = None
    _num_calls: int = 0

    def __call__(self) -> bool:
        """Asked before each optimizer step."""
        self._num_calls += 1  # now the number of the step that follows, from 1
        if self._phase == "timing":
            try:
                return super().__call__()
            except TimeUpError:
                self._phase = "profiling"
                return False
        if self._phase == "profiling":
            if CUDA:
                self._phase = "settling"  # a step in between, so that the profiler has gone
                return False
            raise TimeUpError
        if self._phase == "settling":
            if self._num_calls % self.log_every == 0:
                return False
            self._phase = "counting"
            self._count_syncs()
            return False
        self._end_counting()
        raise TimeUpError

    def state_class(self) -> type:
        """A TrainingState that tells this clock of every micro-step."""
        from sdtrain.training.state import TrainingState

        clock = self

        class Watched(TrainingState):
            def micro_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
                for number, batch in enumerate(super().micro_batches(batches)):
                    clock.before_micro_step(number, self.accumulation)
                    yield batch
                clock.before_micro_step(self.accumulation, self.accumulation)

        return Watched

    def before_micro_step(self, number: int, accumulation: int) -> None:
        """Begins and ends the profiles; `number` of `accumulation` micro-steps are done."""
        if self._phase != "profiling":
            return
        if number == self.num_profiled:
            self.profile = self._end_profile()
        elif number == accumulation:
            self.last_profile = self._end_profile()
        if number in (0, accumulation - 1):
            self._begin_profile()

    def _begin_profile(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if CUDA else []
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()
        self._began = _now()

    def _end_profile(self) -> dict[str, Any]:
        wall_s = _now() - self._began
        self._profiler.stop()
        profile = summed(self._profiler, wall_s)
        self._profiler = None
        return profile

    def _count_syncs(self) -> None:
        self._warnings = warnings.catch_warnings(record=True)
        self._seen = self._warnings.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def _end_counting(self) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._warnings.__exit__(None, None, None)
        places = Counter(f"{entry.filename}:{entry.lineno}" for entry in self._seen if _SYNC in str(entry.message))
        self.syncs = {"per_optimizer_step": sum(places.values()), "places": dict(places.most_common(10))}


def _now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()
