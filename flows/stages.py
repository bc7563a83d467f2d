"""Runs a stage over its pending shards: batches become Prefect tasks."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.futures import PrefectConcurrentFuture, PrefectFuture, as_completed
from prefect.logging import get_run_logger
from prefect.states import Failed, State
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.launch import ends_new_children
from flows.progress import ProgressArtifact
from sdtrain.data.dataset import DatasetDir
from sdtrain.data.manifest import ShardReport
from sdtrain.data.stage import Stage, clear_leftovers, pending, run_batch
from sdtrain.data.totals import StageTotals, add_up
from sdtrain.errors import UserError


@dataclass(frozen=True)
class StageOptions:
    """How the work is spread.

    Attributes:
        workers: batches at once, where the flow's task runner is threads (Prefect's default).
        shards_per_task: shards in one task run; a task should be a minute of work or more.
        task_runner: runs the batches instead of the flow's own task runner.
    """

    workers: int = 2
    shards_per_task: int = 1
    task_runner: TaskRunner[Any] | None = None


def run_stage(stage: Stage[Any], dataset: DatasetDir, recipe: Any, options: StageOptions) -> StageTotals:
    """Does the stage's shards that are not finished. Must be called in a flow.

    A batch that fails does not stop the others.

    Raises:
        UserError: a batch failed for a reason that the user can put right.
        RuntimeError: a batch failed otherwise; its traceback is in the task run's log.
    """
    started, logger = time.monotonic(), get_run_logger()
    clear_leftovers(stage, dataset)
    all_shards = stage.shards(dataset, recipe)
    shards = pending(stage, dataset, recipe)
    reports = _run_batches(stage, dataset, recipe, shards, options) if shards else []
    totals = add_up(stage.name, reports, len(all_shards) - len(shards), time.monotonic() - started)
    logger.info("%s", totals)
    return totals


def _run_batches(
    stage: Stage[Any], dataset: DatasetDir, recipe: Any, shards: Sequence[int], options: StageOptions
) -> list[ShardReport]:
    size = options.shards_per_task
    batches = [list(shards[i : i + size]) for i in range(0, len(shards), size)]
    batch_task = _run_batch.with_options(name=stage.name, task_run_name=f"{stage.name}-{{first}}")
    with (
        ProgressArtifact(stage.name, len(shards), "shards") as progress,
        _task_runner(options) as runner,
        ends_new_children(),
    ):
        common = {"stage": stage, "dataset": dataset, "recipe": recipe}
        futures = [runner.submit(batch_task, {**common, "shards": b, "first": f"{b[0]:05d}"}) for b in batches]
        reports, failures = _collect(futures, progress)
    if failures:
        raise _error(stage.name, failures, len(batches))
    return reports


def _collect(
    futures: list[PrefectFuture[Any]], progress: ProgressArtifact
) -> tuple[list[ShardReport], list[State[Any]]]:
    """The reports of the batches that ended well, and the states of those that did not."""
    reports: list[ShardReport] = []
    failures: list[State[Any]] = []
    try:
        for future in as_completed(futures):
            future.wait()
            if future.state.is_completed():
                reports += future.result()
                progress.show(len(reports))
            else:
                failures.append(future.state)
    except BaseException:
        # Cancelled: no waiting batch may begin when the running ones are ended.
        for future in futures:
            if isinstance(future, PrefectConcurrentFuture):
                future.wrapped_future.cancel()
        raise
    return reports, failures


@task(cache_policy=NO_CACHE, persist_result=False)
def _run_batch(
    stage: Stage[Any], dataset: DatasetDir, recipe: Any, shards: list[int], first: str
) -> list[ShardReport] | State[Any]:
    try:
        return run_batch(stage, dataset, recipe, shards)
    except UserError as error:
        return Failed(message=str(error), data=error)  # as a state, because an exception is logged with its traceback


def _task_runner(options: StageOptions) -> TaskRunner[Any]:
    """A fresh runner: threads bounded by `workers`, or another engine if the flow or the caller chose one."""
    context = FlowRunContext.get()
    runner = options.task_runner or (context.task_runner if context else None)
    if runner is None or (isinstance(runner, ThreadPoolTaskRunner) and options.task_runner is None):
        return ThreadPoolTaskRunner(max_workers=options.workers)
    return runner.duplicate()


def _error(stage: str, failures: list[State[Any]], num_batches: int) -> Exception:
    first = failures[0].result(raise_on_failure=False)
    if isinstance(first, UserError):
        return UserError(str(first))  # anew, without the traceback from the batch
    return RuntimeError(
        f"{stage}: {len(failures)} of {num_batches} batches failed, the first with {first!r}. The finished ones are "
        "kept; the same command goes on from there. See the log of the failed task run."
    )
