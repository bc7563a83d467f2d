"""Runs a stage in the terminal, with a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.progress import StageTotals, Step, add_up, progress_listener, throttled
from sdtrain.dataset.stage import Stage, begin, pending, run_batch

_LINE_INTERVAL_S = 10.0


def run_with_bar(
    stage: Stage[Any],
    dataset: DatasetDir,
    recipe: Any,
    before_work: Callable[[str, int, int], None] = lambda stage, num_pending, num_shards: None,
) -> StageTotals:
    """Makes the unfinished shards of `stage`, with a bar of shards on standard error.

    Progress within a shard (`sdtrain.dataset.progress`) appears beside the bar; without a terminal, as an occasional
    line. `recipe` is the input of the stage's functions; `before_work` is called with the stage's name and the numbers
    of pending and of all shards, if any is pending.
    """
    started = time.monotonic()
    begin(stage, dataset)
    all_shards = stage.shards(dataset, recipe)
    shards = pending(stage, dataset, recipe)
    if shards:
        before_work(stage.name, len(shards), len(all_shards))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task(stage.name, total=len(shards))

        def show(step: Step) -> None:
            bar.update(line, description=str(step))

        listener = show if console.is_terminal else throttled(lambda step: console.print(str(step)), _LINE_INTERVAL_S)
        with progress_listener(listener):
            reports = run_batch(stage, dataset, recipe, shards, lambda report: bar.advance(line)) if shards else []
    return add_up(stage.name, reports, len(all_shards) - len(shards), time.monotonic() - started)
