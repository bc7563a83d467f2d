"""Runs the pending shards of a stage in batches, each a Prefect task."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Annotated, Any

from annotated_types import Ge, Le
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.states import Failed, State
from prefect.task_runners import TaskRunner

from flows.support.batches import Batches, ShardsPerTask, measured_before
from flows.support.clusters import is_given_up, needs_of, num_workers
from flows.support.progress import ProgressArtifact
from flows.support.task_runners import Engine, lost_its_worker, start_engine
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.progress import StageTotals, add_up, progress_listener, throttled
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import Stage, begin, lock_token_of, pending, run_batch
from sdtrain.errors import UserError
from sdtrain.options import option
from sdtrain.redaction import Location, safe_error

LOG_INTERVAL_S = 10.0
# Cancelling the whole process group ends a batch's children before the flow notices.
_CANCEL_DELAY_S = 0.5


@dataclass(frozen=True)
class StageOptions:
    """The distribution of a stage's shards over workers."""

    workers: Annotated[int, Ge(1), Le(256)] = option(
        2, "Batches of shards at once, unless a running cluster decides that."
    )
    shards_per_task: ShardsPerTask = option(
        "auto",
        "Shards in one batch: a number, or auto for about a minute of work by what shards took so far, with at most "
        "2,000 batches a stage and at least two for each worker.",
    )
    engine: Engine = option(
        "threads", "What runs the batches of shards: threads or processes of this machine, or Dask or Ray."
    )
    engine_address: Location | None = option(
        None,
        "A running Dask or Ray cluster's; without, one is started on this machine. All its machines must see the "
        "dataset under the same path.",
    )


def run_stage(
    stage: Stage[Any],
    dataset: DatasetDir,
    recipe: Any,
    options: StageOptions,
    runner: TaskRunner[Any] | None = None,
    before_work: Callable[[str, int, int], None] = lambda stage, num_pending, num_shards: None,
) -> StageTotals:
    """Processes the stage's unfinished shards within a flow; a failed batch does not stop the others.

    Args:
        stage: its functions are found by name in other processes, so no lambdas.
        dataset: on storage that all workers share.
        recipe: the stage functions' argument.
        options: distribution over workers.
        runner: from `start_engine`, if several stages share one engine.
        before_work: called with stage, numbers of pending and of all shards, if any is pending.

    Raises:
        UserError: a batch failed for a reason that the user can correct.
        RuntimeError: a batch failed otherwise; the task run's log has its traceback.
    """
    started, logger = time.monotonic(), get_run_logger()
    begin(stage, dataset)
    all_shards = stage.shards(dataset, recipe)
    shards = pending(stage, dataset, recipe)
    reports: list[ShardReport] = []
    if shards:
        before_work(stage.name, len(shards), len(all_shards))
        engine = (
            nullcontext(runner) if runner else start_engine(options.engine, options.engine_address, options.workers)
        )
        with engine as running:
            batches = Batches(shards, options.shards_per_task, measured_before(dataset, stage.name))
            reports = _run_batches(stage, dataset, recipe, batches, options.workers, running)
    totals = add_up(stage.name, reports, len(all_shards) - len(shards), time.monotonic() - started)
    logger.info("%s", totals)
    return totals


def _run_batches(
    stage: Stage[Any], dataset: DatasetDir, recipe: Any, batches: Batches, workers: int, runner: TaskRunner[Any]
) -> list[ShardReport]:
    batch_task = _run_batch.with_options(name=stage.name, task_run_name=f"{stage.name}-{{first}}")
    common = {"stage": stage, "dataset": dataset, "recipe": recipe, "lock_token": lock_token_of(dataset)}
    submitted = _Submitted(lambda b: runner.submit(batch_task, {**common, "shards": b, "first": f"{b[0]:05d}"}))
    with ProgressArtifact(stage.name, batches.num_left, "shards") as progress, needs_of(stage):
        try:
            while True:
                workers = num_workers(stage, runner, workers)
                _fill(submitted, batches, workers, stage.name)
                if not len(submitted):
                    break
                batches.measured([report.seconds for report in submitted.next_reports()])
                progress.show(len(submitted.reports))
        except BaseException:  # cancelled
            submitted.cancel()
            raise
    if submitted.failures:
        raise _error(stage.name, submitted.failures, batches.num_taken)
    return submitted.reports


def _fill(submitted: "_Submitted", batches: Batches, workers: int, name: str) -> None:
    """Submits batches up to the window's size, unless the engine takes no more."""
    while batches.num_left and submitted.is_open and len(submitted) < batches.window(workers):
        submitted.add(batches.take(workers))
        if batches.remark:
            get_run_logger().info("%s: %s", name, batches.remark)


class _Submitted:
    """The batches on an engine: submitted one by one, and collected as they finish.

    Attributes:
        reports: of the shards of successful batches.
        failures: the errors of the others.
        is_open: whether the engine took the last batch.
    """

    def __init__(self, submit: Callable[[list[int]], PrefectFuture[Any]]) -> None:
        self.reports: list[ShardReport] = []
        self.failures: list[Exception] = []
        self.is_open = True
        self._submit, self._running = submit, set[PrefectFuture[Any]]()
        self._finished = SimpleQueue[PrefectFuture[Any]]()

    def __len__(self) -> int:
        return len(self._running)

    def add(self, batch: list[int]) -> None:
        """Submits a batch; it has failed if the engine does not take it."""
        try:
            future = self._submit(batch)
        except Exception as error:
            self.failures.append(error)
            self.is_open = False
            return
        self._running.add(future)
        future.add_done_callback(self._finished.put)

    def next_reports(self) -> list[ShardReport]:
        """Waits for a batch to finish; its reports, none if it failed."""
        future = self._finished.get()
        self._running.remove(future)
        try:
            reports: list[ShardReport] = future.result()
        except Exception as error:
            self.failures.append(error)
            return []
        self.reports += reports
        return reports

    def cancel(self) -> None:
        """Lets no waiting batch start when the running ones end. On Ray they end with the connection."""
        for future in self._running:
            cancel = getattr(getattr(future, "wrapped_future", None), "cancel", None)
            if cancel:
                cancel()


@task(cache_policy=NO_CACHE, persist_result=False)
def _run_batch(
    stage: Stage[Any], dataset: DatasetDir, recipe: Any, lock_token: str, shards: list[int], first: str
) -> list[ShardReport] | State[Any]:
    logger = get_run_logger()
    try:
        with progress_listener(throttled(lambda step: logger.info("%s", step), LOG_INTERVAL_S)):
            return run_batch(stage, dataset, recipe, shards, _stop_if_given_up, lock_token)
    except UserError as error:
        time.sleep(_CANCEL_DELAY_S)
        return Failed(message=str(error), data=error)  # a state: an exception would be logged with its traceback
    except Exception as error:
        time.sleep(_CANCEL_DELAY_S)  # else the next batch might start in a flow that is ending
        raise safe_error(error)  # noqa: B904  # with its cause, unless that holds a secret


def _stop_if_given_up(report: ShardReport) -> None:
    if is_given_up():
        raise UserError(f"The flow has ended; after shard {report.shard:05d} this batch ends too.")


def _error(stage: str, failures: list[Exception], num_batches: int) -> Exception:
    failed = f"{stage}: {len(failures)} of {num_batches} batches failed"
    again = "The finished ones are kept; the same command goes on from there."
    for error in failures:
        if isinstance(error, UserError):
            return UserError(str(error))  # a new one, without the batch's traceback
    first = f"{type(failures[0]).__name__}: {(str(failures[0]).strip().splitlines() or ['no message'])[-1]}"
    if lost_its_worker(failures[0]):
        return UserError(f"{failed}, because a worker ended, killed or out of memory ({first}). {again}")
    return RuntimeError(f"{failed}, the first with {first}. {again} See the log of the failed task run.")
