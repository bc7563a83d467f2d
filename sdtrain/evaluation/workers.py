"""Runs the steps of an evaluation, in this process or in one process per GPU."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import Stage
from sdtrain.dataset.terminal_progress import run_with_bar
from sdtrain.errors import UserError
from sdtrain.evaluation.results import Results
from sdtrain.evaluation.sweep import Sweep
from sdtrain.preflight.checks import require


def run_sweep(sweep: Sweep, num_processes: int = 1, say: Callable[[str], None] = print) -> Results:
    """Runs the unfinished steps, then computes the numbers; the images do not depend on the number of processes.

    UserError for a mistake that the user can correct; finished parts are kept.
    """
    require(sweep.checks())
    with _pool(num_processes) if num_processes > 1 else nullcontext() as pool:
        for step in sweep.steps():
            stage = step.stage if pool is None else _in_processes(step.stage, pool)
            say(str(run_with_bar(stage, step.directory, step.job)))
    return sweep.finish()


@contextmanager
def _pool(num_processes: int) -> Iterator[ProcessPoolExecutor]:
    threads = max(1, torch.get_num_threads() // num_processes)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, _init_worker, (threads,)) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _in_processes(stage: Stage[Any], pool: ProcessPoolExecutor) -> Stage[Any]:

    def run(dataset: DatasetDir, job: Any, parts: Sequence[int]) -> Iterator[ShardReport]:
        futures = [pool.submit(_run_part, stage, dataset, job, part) for part in parts]
        try:
            yield from _completed_reports(futures)
        except BrokenProcessPool as error:
            raise UserError(
                "A process of the evaluation was ended from outside. Is there too little memory? Lower --batch-size, "
                "or the number of processes; what is finished is kept."
            ) from error

    return replace(stage, run=run)


def _completed_reports(futures: Sequence[Future[ShardReport]]) -> Iterator[ShardReport]:
    """Yields reports as they complete; on error no part starts, and running ones finish before it is raised."""
    failed: Exception | None = None
    for future in as_completed(futures):
        if future.cancelled():
            continue
        try:
            report = future.result()
        except Exception as error:
            failed = failed or error
            for other in futures:
                other.cancel()
            continue
        yield report
    if failed is not None:
        raise failed


def _run_part(stage: Stage[Any], dataset: DatasetDir, job: Any, part: int) -> ShardReport:
    return next(iter(stage.run(dataset, job, [part])))


def _init_worker(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exits with the parent; an orphan would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
