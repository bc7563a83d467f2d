"""Divides a stage's pending shards into batches of about a minute's work, from the seconds that its shards take."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Annotated, Literal

import pyarrow.compute as pc
from annotated_types import Ge

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import entries

ShardsPerTask = Annotated[int, Ge(1)] | Literal["auto"]

TASK_S = 60.0
"""A batch's work; starting it costs some 20 ms of the Prefect server's time."""
MAX_TASKS = 2_000
"""Batches of a stage: each is a record of 20 KB in Prefect's database."""
TASKS_PER_WORKER = 2
"""At least; with one, all would wait for the slowest."""
WINDOW_PER_WORKER = 3
"""Batches submitted and unfinished: the one that runs, and others so that a worker never waits for the flow."""
_RECENT_SHARDS = 100
"""Their mean is taken: an earlier run may have had another machine, and the first shards load the networks."""
_GROWTH = 2
"""A batch has at most so many times the shards that were measured, so that a single odd one decides little."""
_MAX_FIRST_TASKS = MAX_TASKS // 4
"""Of one shard each, before anything is measured."""


_WORTH_REMARK = 1.5
"""The factor by which the size changes between two lines in the log."""


@dataclass(frozen=True)
class _Size:
    """A number of shards per task, and why it is that one."""

    num_shards: int
    reason: str


class Batches:
    """Hands out a stage's pending shards in order, each once, batch after batch.

    A number of `shards_per_task` is kept to. With "auto" the first batches are single shards, one for each worker, and
    the size of each later one follows from the mean of the last 100 measured shards: `TASK_S` of work, unless that
    makes more than `MAX_TASKS`, which counts most, or fewer than `TASKS_PER_WORKER` for each worker.

    Args:
        shards: the pending ones.
        shards_per_task: a number, or "auto".
        seconds: what this stage's shards took in earlier runs, the latest last.

    Attributes:
        num_taken: batches handed out.
        remark: on the size of the last one, if it differs much from the one last remarked on; a line for the log.
    """

    def __init__(self, shards: Sequence[int], shards_per_task: ShardsPerTask, seconds: Sequence[float] = ()) -> None:
        self.num_taken, self.remark, self._remarked = 0, "", 0
        self._shards, self._shards_per_task, self._offset = shards, shards_per_task, 0
        self._recent_s, self._num_measured = deque(seconds, _RECENT_SHARDS), len(seconds)

    @property
    def num_left(self) -> int:
        """Shards not handed out yet."""
        return len(self._shards) - self._offset

    def window(self, workers: int) -> int:
        """The number of batches to have submitted and unfinished at most."""
        is_measured = self._shards_per_task != "auto" or self._num_measured > 0
        return WINDOW_PER_WORKER * workers if is_measured else workers

    def take(self, workers: int) -> list[int]:
        """The next batch, shorter than its size only if it is the last; ValueError if none is left."""
        if not self.num_left:
            raise ValueError("no shards are left")
        size = self._size(workers)
        self.remark = self._remark_on(size)
        batch = list(self._shards[self._offset : self._offset + size.num_shards])
        self._offset += len(batch)
        self.num_taken += 1
        return batch

    def measured(self, seconds: Sequence[float]) -> None:
        """Takes note of what the shards of a finished batch took."""
        self._recent_s.extend(seconds)
        self._num_measured += len(seconds)

    def _remark_on(self, size: _Size) -> str:
        smaller, larger = sorted((self._remarked, size.num_shards))
        if len(self._shards) == 1 or larger < _WORTH_REMARK * smaller:
            return ""
        self._remarked = size.num_shards
        return f"{self.num_left:,} shards to do, {size.num_shards:,} per task ({size.reason})"

    def _size(self, workers: int) -> _Size:
        if self._shards_per_task != "auto":
            return _Size(self._shards_per_task, "as set")
        least = _Size(ceil(self.num_left / (MAX_TASKS - self.num_taken)), f"at most {MAX_TASKS:,} tasks a stage")
        if not self._num_measured:
            is_first = self.num_taken < min(workers, _MAX_FIRST_TASKS)
            unmeasured = _Size(1, "to see how long one takes")
            return unmeasured if is_first or least.num_shards == 1 else least
        wanted = self._wanted(workers)
        return wanted if wanted.num_shards >= least.num_shards else least

    def _wanted(self, workers: int) -> _Size:
        mean_s = sum(self._recent_s) / len(self._recent_s)
        by_time = int(min(TASK_S / mean_s if mean_s else inf, len(self._shards)))
        by_workers = len(self._shards) // (TASKS_PER_WORKER * workers)
        limits = (
            _Size(by_time, f"one takes about {mean_s:.3g} s"),
            _Size(by_workers, f"at least {TASKS_PER_WORKER} tasks for each of {workers:,} workers"),
            _Size(_GROWTH * self._num_measured, f"only {self._num_measured:,} measured so far"),
        )
        smallest = min(limits, key=lambda limit: limit.num_shards)
        return _Size(max(1, smallest.num_shards), smallest.reason)


def measured_before(dataset: DatasetDir, stage: str) -> list[float]:
    """Seconds of the stage's recorded shards, in the order in which they finished; none of old ones without a time."""
    table = entries(dataset, stage).table
    seconds: list[float] = table.filter(pc.field("seconds") > 0).sort_by("finished_at")["seconds"].to_pylist()
    return seconds
