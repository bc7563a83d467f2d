"""A dataset's progress, from its manifest alone, so that asking is cheap and needs no server."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from filters import pipeline
from filters.recipe import Recipe
from filters.recipe_record import read_recipe
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.lock import active_commands
from sdtrain.dataset.manifest import entries
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import Stage

_WINDOW_S = 3600.0
"""Window of the rate, back from the last finished shard."""


@dataclass(frozen=True)
class StageStatus:
    """One stage.

    Attributes:
        num_done: finished shards.
        num_shards: all; None until an earlier stage determines it.
        num_in, num_out: samples of the finished ones.
        dropped: samples, by reason.
        seconds: work on the finished shards, which may have overlapped.
        samples_per_s: wall-clock rate over the last hour of its work; None for fewer than two shards.
        left_s: time to its end at that rate.
    """

    stage: str
    num_done: int
    num_shards: int | None
    num_in: int
    num_out: int
    dropped: dict[str, int]
    num_bytes: int
    seconds: float
    samples_per_s: float | None
    left_s: float | None


@dataclass(frozen=True)
class DatasetStatus:
    """A dataset at `place`, its directory or URL, with its stages in order.

    `users` is a sentence for each active command; `free_bytes` is on its disk, or that of its work folder.
    """

    place: str
    recipe: str
    stages: Sequence[StageStatus]
    users: Sequence[str]
    free_bytes: int


def dataset_status(dataset: DatasetDir) -> DatasetStatus:
    """Returns a dataset's progress; raises `UserError` if it does not exist or its manifest is damaged."""
    recipe = read_recipe(dataset)
    stages = [_status(stage, dataset, recipe) for stage in pipeline.STAGES]
    return DatasetStatus(
        str(dataset), recipe.name, stages, active_commands(dataset), shutil.disk_usage(dataset.root).free
    )


def _status(stage: Stage[Recipe], dataset: DatasetDir, recipe: Recipe) -> StageStatus:
    done = entries(dataset, stage.name)
    num_shards, rate = stage.num_shards(dataset, recipe), _rate(done)
    dropped: Counter[str] = Counter()
    for entry in done:
        dropped.update(entry.dropped)
    num_in = sum(entry.num_in for entry in done)
    left_s = None
    if rate and num_shards is not None:
        left_s = (num_shards - len(done)) * num_in / len(done) / rate
    return StageStatus(
        stage=stage.name,
        num_done=len(done),
        num_shards=num_shards,
        num_in=num_in,
        num_out=sum(entry.num_out for entry in done),
        dropped=dict(dropped),
        num_bytes=sum(output.bytes for entry in done for output in entry.outputs.values()),
        seconds=sum(entry.seconds for entry in done),
        samples_per_s=rate,
        left_s=left_s,
    )


def _rate(done: Sequence[ShardReport]) -> float | None:
    times = sorted((entry.finished_at, entry.num_in) for entry in done if entry.finished_at)
    recent = [(at, num) for at, num in times if at >= times[-1][0] - _WINDOW_S]
    if len(recent) < 2 or recent[-1][0] == recent[0][0]:
        return None
    return sum(num for _, num in recent[1:]) / (recent[-1][0] - recent[0][0])
