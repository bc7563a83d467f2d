"""Prometheus metrics of datasets and training runs, read from disk on each scrape."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from filters.inspect.status import DatasetStatus, dataset_status
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.open import dataset_at, open_dataset
from sdtrain.dataset.s3.url import is_s3
from sdtrain.errors import UserError
from sdtrain.redaction import without_secrets
from sdtrain.training.run_dir import RunStatus, is_run_dir, run_status

# The log's name of a metric -> Prometheus's name and description.
_METRICS = {
    "loss": ("sdtrain_training_loss", "mean squared error of the last line of the log"),
    "lr": ("sdtrain_training_learning_rate", "learning rate"),
    "grad_norm": ("sdtrain_training_gradient_norm", "norm of the gradient over all ranks, before clipping"),
    "images_per_s": ("sdtrain_training_images_per_second", "images a second of all ranks together"),
    "data_wait": ("sdtrain_training_data_wait_ratio", "share of the time spent waiting for data"),
    "mfu": ("sdtrain_training_mfu_ratio", "model FLOPs utilisation"),
    "memory_gb": ("sdtrain_training_memory_gigabytes", "memory of the first rank at most"),
    "num_skipped": ("sdtrain_training_skipped_steps", "optimizer steps that were not applied"),
}
_LIST_EVERY_S = 60.0
"""Minimum interval between listings of a dataset on S3 (1,000 objects a request), however often Prometheus asks."""
_log = logging.getLogger(__name__)


class StatusCollector(Collector):
    """Metrics of `sdtrain status` for `names` (directories or s3://…); unreadable ones only show in `sdtrain_up`."""

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._listed: dict[str, float] = {}

    def collect(self) -> Iterator[Metric]:
        """Yields all current metrics."""
        up = GaugeMetricFamily("sdtrain_up", "whether a directory can be read", labels=["path"])
        datasets, runs = [], []
        for name in self._names:
            try:
                if is_run_dir(Path(name)):
                    runs.append(run_status(Path(name)))
                else:
                    datasets.append(dataset_status(self._open(name)))
                up.add_metric([without_secrets(name)], 1)
            except (UserError, OSError) as error:
                _log.warning("%s", error)
                up.add_metric([without_secrets(name)], 0)
        yield up
        yield from _of_datasets(datasets)
        yield from _of_runs(runs)

    def _open(self, name: str) -> DatasetDir:
        now = time.monotonic()
        if is_s3(name) and now - self._listed.get(name, -_LIST_EVERY_S) < _LIST_EVERY_S:
            return dataset_at(name)
        dataset = open_dataset(name)
        self._listed[name] = now
        return dataset


def serve_metrics(names: Sequence[str], host: str, port: int) -> tuple[int, threading.Thread]:
    """Serves Prometheus on its own thread; returns the port and the thread. Raises `UserError` if the port is taken."""
    registry = CollectorRegistry()
    registry.register(StatusCollector(names))
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise UserError(f"{host} port {port} is not available ({error.strerror}). Choose another --port.") from error
    return server.server_port, thread


def _of_datasets(datasets: Iterable[DatasetStatus]) -> Iterator[Metric]:
    labels = ["dataset", "stage"]
    done = GaugeMetricFamily("sdtrain_stage_shards_done", "finished shards", labels=labels)
    shards = GaugeMetricFamily("sdtrain_stage_shards", "all shards of a stage, as far as known", labels=labels)
    num_in = CounterMetricFamily("sdtrain_stage_samples_in", "samples that came in", labels=labels)
    num_out = CounterMetricFamily("sdtrain_stage_samples_out", "samples that went on", labels=labels)
    dropped = CounterMetricFamily("sdtrain_stage_samples_dropped", "samples dropped", labels=[*labels, "reason"])
    written = CounterMetricFamily("sdtrain_stage_written_bytes", "size of what a stage wrote", labels=labels)
    work = CounterMetricFamily("sdtrain_stage_work_seconds", "work on finished shards", labels=labels)
    rate = GaugeMetricFamily("sdtrain_stage_samples_per_second", "over the last hour of its work", labels=labels)
    left = GaugeMetricFamily("sdtrain_stage_left_seconds", "until a stage's end at that rate", labels=labels)
    users = GaugeMetricFamily("sdtrain_dataset_users", "commands that use a dataset", labels=["dataset"])
    free = GaugeMetricFamily("sdtrain_dataset_free_bytes", "free on its disk", labels=["dataset"])
    for dataset in datasets:
        name = dataset.place
        users.add_metric([name], len(dataset.users))
        free.add_metric([name], dataset.free_bytes)
        for stage in dataset.stages:
            at = [name, stage.stage]
            _add(done, at, stage.num_done)
            _add(shards, at, stage.num_shards)
            _add(num_in, at, stage.num_in)
            _add(num_out, at, stage.num_out)
            _add(written, at, stage.num_bytes)
            _add(work, at, stage.seconds)
            _add(rate, at, stage.samples_per_s)
            _add(left, at, stage.left_s)
            for reason, number in stage.dropped.items():
                _add(dropped, [*at, reason], number)
    yield from (done, shards, num_in, num_out, dropped, written, work, rate, left, users, free)


def _of_runs(runs: Iterable[RunStatus]) -> Iterator[Metric]:
    step = GaugeMetricFamily("sdtrain_training_step", "optimizer steps done", labels=["run"])
    steps = GaugeMetricFamily("sdtrain_training_steps", "optimizer steps of the whole run", labels=["run"])
    left = GaugeMetricFamily("sdtrain_training_left_seconds", "until the run's end", labels=["run"])
    free = GaugeMetricFamily("sdtrain_training_free_bytes", "free on the run's disk", labels=["run"])
    beats = GaugeMetricFamily(
        "sdtrain_training_heartbeat_age_seconds", "since a rank's last sign of life", labels=["run", "rank"]
    )
    logged = {name: GaugeMetricFamily(*named, labels=["run"]) for name, named in _METRICS.items()}
    for run in runs:
        name = str(run.path)
        _add(step, [name], run.step)
        _add(steps, [name], run.num_steps)
        _add(left, [name], run.left_s)
        _add(free, [name], run.free_bytes)
        for rank, age_s in run.heartbeats_s.items():
            _add(beats, [name, str(rank)], age_s)
        for metric, value in run.metrics.items():
            _add(logged[metric], [name], value)
    yield from (step, steps, left, free, beats, *logged.values())


def _add(metric: Any, labels: list[str], value: float | None) -> None:
    if value is not None:
        metric.add_metric(labels, value)
