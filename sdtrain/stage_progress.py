"""Runs a stage in the terminal, with a bar."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sdtrain.data.dataset import DatasetDir
from sdtrain.data.stage import Stage, begin, pending, run_batch
from sdtrain.data.steps import Step, listening, seldom
from sdtrain.data.totals import StageTotals, add_up

_LINE_INTERVAL_S = 10.0


def run_with_bar(stage: Stage[Any], dataset: DatasetDir, recipe: Any) -> StageTotals:
    """Does the shards of `stage` that are not finished; the bar counts shards, on standard error.

    What a shard tells of itself (`sdtrain.data.steps`) stands beside the bar; without a terminal it is a line now and
    then.
    """
    started = time.monotonic()
    begin(stage, dataset)
    all_shards = stage.shards(dataset, recipe)
    shards = pending(stage, dataset, recipe)
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

        listener = show if console.is_terminal else seldom(lambda step: console.print(str(step)), _LINE_INTERVAL_S)
        with listening(listener):
            reports = run_batch(stage, dataset, recipe, shards, lambda report: bar.advance(line)) if shards else []
    return add_up(stage.name, reports, len(all_shards) - len(shards), time.monotonic() - started)
