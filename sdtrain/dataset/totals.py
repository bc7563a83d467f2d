"""What a stage did, over all of its shards, as numbers and as one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from sdtrain.dataset.manifest import ShardReport


@dataclass(frozen=True)
class StageTotals:
    """The sum of shard reports.

    Attributes:
        stage: the stage's name.
        num_shards: shards done now.
        num_finished_before: shards that an earlier run had finished, not counted below.
        num_in: samples that came in.
        num_out: samples that went on.
        dropped: samples dropped, by reason; num_in = num_out + their sum.
        seconds: wall time.
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
    """The totals of `reports`; `seconds` is wall time, as shards may run side by side."""
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
