"""Reports the progress of long work to listeners, and sums up a finished stage."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from sdtrain.dataset.shard_report import ShardReport

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """Progress of one step of a task; `seconds` since its start."""

    name: str
    done: int
    total: int
    unit: str
    seconds: float

    def __str__(self) -> str:
        """For a line of a log."""
        text = f"{self.name}: {self.done:,} of {self.total:,} {self.unit}"
        if not 0 < self.done < self.total:
            return text
        left_s = self.seconds * (self.total - self.done) / self.done
        return f"{text}, about {left_s / 60:.0f} min left" if left_s >= 120 else f"{text}, about {left_s:.0f} s left"


Listener = Callable[[Step], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def progress_listener(listener: Listener) -> Iterator[None]:
    """Sends the steps reported within the block, in its thread, to `listener`."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def throttled(listener: Listener, interval_s: float) -> Listener:
    """Calls `listener` at most once an interval, first after one has passed."""
    last = time.monotonic()

    def listen(step: Step) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= interval_s:
            last = now
            listener(step)

    return listen


def report_progress(
    items: Iterable[T], name: str, total: int, unit: str, size: Callable[[T], int] = lambda item: 1
) -> Iterator[T]:
    """Yields the items, and reports how many are done each time the next is requested.

    An item adds its `size` to the count, up to `total`, in `unit`.
    """
    listener, started, done = _listener.get(), time.monotonic(), 0
    for item in items:
        done += size(item)
        yield item
        del item  # may be large: free it before the next is made
        if listener:
            listener(Step(name, done, total, unit, time.monotonic() - started))


@dataclass(frozen=True)
class StageTotals:
    """The sum of shard reports: num_in = num_out + the sum of `dropped`, which counts by reason.

    Shards of earlier runs appear only in `num_finished_before`.
    """

    stage: str
    num_shards: int = 0
    num_finished_before: int = 0
    num_in: int = 0
    num_out: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self) -> str:
        """One line for terminal and log."""
        if not self.num_shards:
            return f"{self.stage}: finished before, nothing to do"
        before = f" ({self.num_finished_before} finished before)" if self.num_finished_before else ""
        return (
            f"{self.stage}: {_counted(self.num_shards, 'shard')}{before}, {self.num_in:,} in, {self.num_out:,} out, "
            f"{self._dropped()}, {self.seconds:.1f} s"
        )

    def _dropped(self) -> str:
        if not self.dropped:
            return "none dropped"
        most_first = sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in most_first)
        return f"{sum(self.dropped.values()):,} dropped ({reasons})"


def add_up(stage: str, reports: Iterable[ShardReport], num_finished_before: int, seconds: float) -> StageTotals:
    """The totals of `reports`; `seconds` is wall time, as shards may run in parallel."""
    done = list(reports)
    dropped: Counter[str] = Counter()
    for report in done:
        dropped.update({reason: count for reason, count in report.dropped.items() if count})
    return StageTotals(
        stage=stage,
        num_shards=len(done),
        num_finished_before=num_finished_before,
        num_in=sum(report.num_in for report in done),
        num_out=sum(report.num_out for report in done),
        dropped=dict(dropped),
        seconds=seconds,
    )


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
