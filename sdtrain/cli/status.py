"""`sdtrain status` and `sdtrain metrics`: progress of datasets and training runs."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdtrain.cli.output import AsJson, print_json, print_table
from sdtrain.errors import UserError

if TYPE_CHECKING:
    from filters.inspect.status import DatasetStatus, StageStatus
    from sdtrain.training.run_dir import RunStatus

_LIST_EVERY_S = 30.0
"""Listing a dataset on S3 takes a request per thousand objects."""

# Our own code is imported inside the commands, so that help does not wait for it.


def status(
    directory: Annotated[str, typer.Argument(help="A dataset (its directory, or s3://…), or a training run.")],
    watch: Annotated[float | None, typer.Option(help="Show it again every so many seconds, until Ctrl-C.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show how far a dataset or a training run is, which commands use it, and how long it will take."""
    from sdtrain.dataset.s3.url import is_s3

    while True:
        found = _status_of(directory)
        if as_json:
            print_json(asdict(found))
        else:
            _show(found)
        if watch is None:
            return
        time.sleep(max(_LIST_EVERY_S if is_s3(directory) else 1.0, watch))


def metrics(
    names: Annotated[list[str], typer.Argument(help="Datasets (directories, or s3://…) and training runs.")],
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 9464,
) -> None:
    """Answer Prometheus with what `status` shows, until Ctrl-C; infra/grafana has a dashboard for it."""
    from filters.inspect.prometheus import serve_metrics
    from sdtrain.dataset.s3.url import is_s3, parse_url

    missing = [name for name in names if not is_s3(name) and not Path(name).is_dir()]
    if missing:
        raise UserError(f"There is no directory {missing[0]}.")
    places = [str(parse_url(name)) if is_s3(name) else str(Path(name).absolute()) for name in names]
    port, thread = serve_metrics(places, host, port)
    print(f"http://{host}:{port}/metrics  (Ctrl-C ends it)", flush=True)
    thread.join()


def _status_of(directory: str) -> DatasetStatus | RunStatus:
    from filters.inspect.status import dataset_status
    from sdtrain.dataset.open import open_dataset
    from sdtrain.training.run_dir import is_run_dir, run_status

    if is_run_dir(Path(directory)):
        return run_status(Path(directory))
    return dataset_status(open_dataset(directory))


def _show(found: DatasetStatus | RunStatus) -> None:
    from filters.inspect.status import DatasetStatus

    if isinstance(found, DatasetStatus):
        _show_dataset(found)
    else:
        _show_run(found)


def _show_dataset(found: DatasetStatus) -> None:
    print(f"recipe: {found.recipe}")
    print_table([_row(stage) for stage in found.stages])
    for sentence in found.users or ["No command uses it."]:
        print(sentence)
    print(f"{sum(stage.num_bytes for stage in found.stages) / 1e9:,.2f} GB written, {found.free_bytes / 1e9:,.0f} free")


def _row(stage: StageStatus) -> dict[str, object]:
    rate = f"{stage.samples_per_s:,.1f}" if stage.samples_per_s else ""
    left = str(timedelta(seconds=round(stage.left_s))) if stage.left_s else ""
    return {
        "stage": stage.stage,
        "shards": f"{stage.num_done:,}/{'?' if stage.num_shards is None else f'{stage.num_shards:,}'}",
        "in": stage.num_in,
        "out": stage.num_out,
        "dropped": sum(stage.dropped.values()),
        "seconds": round(stage.seconds, 1),
        "samples/s": rate,
        "left": left,
        "GB": f"{stage.num_bytes / 1e9:,.2f}",
    }


def _show_run(run: RunStatus) -> None:
    print(f"{run.name}: step {run.step:,} of {run.num_steps:,}{', finished' if run.is_done else ''}")
    if run.metrics:
        print_table([{name: f"{value:,.4g}" for name, value in run.metrics.items()}])
    if run.left_s:
        print(f"{timedelta(seconds=round(run.left_s))} left at this rate")
    if run.heartbeats_s:
        oldest = max(run.heartbeats_s, key=lambda rank: run.heartbeats_s[rank])
        print(f"{len(run.heartbeats_s)} ranks; rank {oldest} was last heard of {run.heartbeats_s[oldest]:.0f} s ago")
    print(f"{run.free_bytes / 1e9:,.0f} GB free")
