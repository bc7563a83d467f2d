"""A dataset's progress, from its manifest alone, so that asking is cheap and needs no server."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from filters import pipeline
from filters.recipe import Recipe
from filters.recipe_record import read_recipe
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.lock import active_commands
from sdtrain.dataset.manifest import bulk_reads
from sdtrain.dataset.manifest_table import StageEntries
from sdtrain.dataset.stage import Stage, current_entries

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
    with bulk_reads():
        stages = [_status(stage, dataset, recipe) for stage in pipeline.stages_of(recipe)]
    name = f"{recipe.name}, imported from {recipe.source.path}" if recipe.source else recipe.name
    return DatasetStatus(str(dataset), name, stages, active_commands(dataset), shutil.disk_usage(dataset.root).free)


def _status(stage: Stage[Recipe], dataset: DatasetDir, recipe: Recipe) -> StageStatus:
    done = current_entries(stage, dataset, recipe)
    num_shards, rate = stage.num_shards(dataset, recipe), _rate(done)
    num_in = done.total("num_in")
    left_s = None
    if rate and num_shards is not None:
        left_s = (num_shards - len(done)) * num_in / len(done) / rate
    return StageStatus(
        stage=stage.name,
        num_done=len(done),
        num_shards=num_shards,
        num_in=num_in,
        num_out=done.total("num_out"),
        dropped=dict(done.dropped()),
        num_bytes=done.total("num_bytes"),
        seconds=float(done.table["seconds"].to_numpy().sum()),
        samples_per_s=rate,
        left_s=left_s,
    )


def _rate(done: StageEntries) -> float | None:
    times, nums = (done.table[name].to_numpy() for name in ("finished_at", "num_in"))
    recent = np.flatnonzero((times > 0) & (times >= times.max(initial=0) - _WINDOW_S))
    recent = recent[np.argsort(times[recent])]
    if len(recent) < 2 or times[recent[-1]] == times[recent[0]]:
        return None
    return float(nums[recent[1:]].sum() / (times[recent[-1]] - times[recent[0]]))
