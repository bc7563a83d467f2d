"""A stage is one small function over one shard; this runs it over the shards that are not finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sdtrain.dataset.files import sweep
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import forget_entry, is_whole, read_entry
from sdtrain.dataset.recorder import Recorder
from sdtrain.dataset.s3.lock import with_lock_token
from sdtrain.dataset.s3.mirror import mirror_of
from sdtrain.dataset.s3.sync import fetch_inputs, fetch_plan
from sdtrain.dataset.shard_report import ShardReport

# Contravariant: a stage that reads a part of the recipe also takes the whole one.
RecipeT = TypeVar("RecipeT", contravariant=True)


@dataclass(frozen=True)
class Stage(Generic[RecipeT]):
    """One step of the road.

    Attributes:
        name: its name in manifests, logs and on the command line.
        shards: which shards there are to do, once the stage before has finished.
        fingerprint: digest of all that decides a shard's bytes (`manifest.fingerprint`).
        run: does some shards, yielding a report for each once its outputs have their final names.
    """

    name: str
    shards: Callable[[DatasetDir, RecipeT], list[int]]
    fingerprint: Callable[[DatasetDir, RecipeT, int], str]
    run: Callable[[DatasetDir, RecipeT, Sequence[int]], Iterator[ShardReport]]


def pending(stage: Stage[RecipeT], dataset: DatasetDir, recipe: RecipeT) -> list[int]:
    """Shards that have no finished output of this very configuration."""
    return [shard for shard in stage.shards(dataset, recipe) if not is_finished(stage, dataset, recipe, shard)]


def is_finished(stage: Stage[RecipeT], dataset: DatasetDir, recipe: RecipeT, shard: int) -> bool:
    """Whether the shard was made from the same input and configuration and is still whole."""
    entry = read_entry(dataset, stage.name, shard)
    if entry is None or not is_whole(dataset, entry):
        return False
    return entry.fingerprint == stage.fingerprint(dataset, recipe, shard)


def run_batch(
    stage: Stage[RecipeT],
    dataset: DatasetDir,
    recipe: RecipeT,
    shards: Sequence[int],
    on_report: Callable[[ShardReport], None] = lambda report: None,
    hold: str = "",
) -> list[ShardReport]:
    """Runs the stage over `shards` and records each as finished, the entry written last.

    Args:
        stage: what is done.
        dataset: whose shards.
        recipe: what the stage's functions take.
        shards: their numbers.
        on_report: called for each that is recorded.
        hold: what `hold_of` gives in the process that has locked the dataset, where this is another one.
    """
    with with_lock_token(hold):
        return _run_batch(stage, dataset, recipe, shards, on_report)


def hold_of(dataset: DatasetDir) -> str:
    """What this process gives to others that are to write for it; empty for a dataset that lies on disk alone."""
    mirror = mirror_of(dataset)
    return mirror.token if mirror else ""


def _run_batch(
    stage: Stage[RecipeT],
    dataset: DatasetDir,
    recipe: RecipeT,
    shards: Sequence[int],
    on_report: Callable[[ShardReport], None],
) -> list[ShardReport]:
    for shard in shards:
        # What is about to be overwritten must not look finished if this run is killed.
        forget_entry(dataset, stage.name, shard)
    started = time.monotonic()
    fetch_inputs(dataset, stage.name, shards)
    with Recorder(dataset, on_report) as recorder:
        for report in stage.run(dataset, recipe, shards):
            now = time.monotonic()
            digest = stage.fingerprint(dataset, recipe, report.shard)
            times = {"seconds": round(now - started, 3), "finished_at": round(time.time(), 3)}
            recorder.add(report.model_copy(update={"fingerprint": digest} | times))
            started = now
    return recorder.reports


def begin(stage: Stage[RecipeT], dataset: DatasetDir) -> None:
    """Before a stage's shards are looked at: what other machines finished is known here, and nothing half-done lies."""
    if mirror := mirror_of(dataset):
        mirror.sync(may_delete=False)
        fetch_plan(dataset, stage.name)
    clear_leftovers(stage, dataset)


def clear_leftovers(stage: Stage[RecipeT], dataset: DatasetDir) -> None:
    """Deletes what killed runs of this stage left under temporary names."""
    for directory in (dataset.root, *(p for p in dataset.root.glob("*") if p.is_dir())):
        sweep(directory)
    sweep(dataset.manifest_entry(stage.name, 0).parent)
