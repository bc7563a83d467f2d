"""Batches are submitted within a window, collected, counted and cancelled, on real threads; on Prefect's as well."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.futures import PrefectConcurrentFuture
from prefect.logging import disable_run_logger
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.testing.utilities import prefect_test_harness

from flows.support import stage_runner
from flows.support.batches import WINDOW_PER_WORKER, ShardsPerTask
from flows.support.clusters import num_workers
from flows.support.stage_runner import StageOptions, run_stage
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import plain_stage
from sdtrain.errors import UserError


class Threads:
    """A runner of threads without a Prefect server; it counts the batches submitted and unfinished."""

    def __init__(self, workers: int, takes: int = 10_000) -> None:
        self.batches: list[list[int]] = []
        self.most_unfinished = self._unfinished = 0
        self._pool, self._takes, self._lock = ThreadPoolExecutor(workers), takes, threading.Lock()

    def submit(self, task: Any, parameters: dict[str, Any]) -> Any:
        if len(self.batches) == self._takes:
            raise ConnectionError("the scheduler is gone")
        self.batches.append(parameters["shards"])
        with self._lock:
            self._unfinished += 1
            self.most_unfinished = max(self.most_unfinished, self._unfinished)
        future = self._pool.submit(self._run, task.fn, parameters)
        return PrefectConcurrentFuture(uuid4(), future)

    def _run(self, function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
        try:
            with disable_run_logger():
                return function(**parameters)
        finally:
            with self._lock:
                self._unfinished -= 1

    def close(self) -> None:
        self._pool.shutdown()


NUM_SHARDS = 60


def _work(dataset: DatasetDir, recipe: dict[int, Exception], shards: list[int]) -> Iterator[ShardReport]:
    for shard in shards:
        dataset.root.joinpath(f"begun-{shard}").touch()
        if shard in recipe:
            raise recipe[shard]
        yield ShardReport(stage="count", shard=shard, num_in=1, num_out=1)


COUNT = plain_stage("count", lambda *_: list(range(NUM_SHARDS)), lambda *_: "one", _work)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the progress bar shows, without a server."""
    seen: list[int] = []

    class Bar:
        def __init__(self, *_: object) -> None:
            pass

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def show(self, done: int) -> None:
            seen.append(done)

    monkeypatch.setattr(stage_runner, "ProgressArtifact", Bar)
    monkeypatch.setattr(stage_runner, "_CANCEL_DELAY_S", 0)
    monkeypatch.setattr(stage_runner, "get_run_logger", lambda: logging.getLogger("flow"))
    return seen


def run_count(folder: Path, runner: Threads, size: ShardsPerTask = "auto", recipe: Any = ()) -> Any:
    try:
        return run_stage(COUNT, DatasetDir(folder), dict(recipe), StageOptions(2, size), runner)  # type: ignore[arg-type]
    finally:
        runner.close()


@pytest.mark.parametrize("size", [1, 7, "auto"])
def test_no_more_than_the_window_is_submitted(size: ShardsPerTask, tmp_path: Path, shown: list[int]) -> None:
    runner = Threads(2)
    assert run_count(tmp_path, runner, size).num_shards == NUM_SHARDS
    assert 2 <= runner.most_unfinished <= 2 * WINDOW_PER_WORKER
    assert [shard for batch in runner.batches for shard in batch] == list(range(NUM_SHARDS))
    assert shown == sorted(shown)
    assert shown[-1] == NUM_SHARDS


def test_log_tells_the_size_and_why(tmp_path: Path, shown: list[int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "flow")
    run_count(tmp_path, Threads(2))
    assert "count: 60 shards to do, 1 per task (to see how long one takes)" in caplog.text
    (tmp_path / "twenty").mkdir()
    run_count(tmp_path / "twenty", Threads(2), 20)
    assert "count: 60 shards to do, 20 per task (as set)" in caplog.text


def test_failed_batches_are_counted_and_the_others_finish(tmp_path: Path, shown: list[int]) -> None:
    runner = Threads(2)
    with pytest.raises(RuntimeError, match="count: 2 of 12 batches failed, the first with ValueError: no"):
        run_count(tmp_path, runner, 5, {3: ValueError("no"), 44: ValueError("no")})
    assert len(list(tmp_path.glob("begun-*"))) == NUM_SHARDS - 1, "only 4, after 3 in its batch, is not begun"


def test_engine_that_takes_no_more_batches_ends_the_stage(tmp_path: Path, shown: list[int]) -> None:
    runner = Threads(2, takes=4)
    with pytest.raises(RuntimeError, match="count: 1 of 5 batches failed, the first with ConnectionError: the sched"):
        run_count(tmp_path, runner, 10)
    assert shown[-1] == 40


class Cancelled(BaseException):
    """As Prefect raises it in the flow's main thread."""


def test_cancelled_flow_starts_no_new_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: list[int]) -> None:
    goes_on = threading.Event()

    def wait(dataset: DatasetDir, recipe: object, shards: list[int]) -> Iterator[ShardReport]:
        dataset.root.joinpath(f"begun-{shards[0]}").touch()
        if shards[0]:
            goes_on.wait()
        yield ShardReport(stage="wait", shard=shards[0], num_in=0, num_out=0)

    def cancel(submitted: Any) -> None:
        to_the_end(submitted)
        goes_on.set()

    def raises(self: object, done: int) -> None:
        raise Cancelled

    to_the_end = stage_runner._Submitted.cancel
    monkeypatch.setattr(stage_runner._Submitted, "cancel", cancel)
    monkeypatch.setattr(stage_runner.ProgressArtifact, "show", raises)
    runner = Threads(2)
    stage = plain_stage("wait", COUNT.shards, COUNT.fingerprint, wait)
    with pytest.raises(Cancelled):
        run_stage(stage, DatasetDir(tmp_path), None, StageOptions(2, 1), runner)  # type: ignore[arg-type]
    runner.close()
    # Shard 0 finished; the two that had begun by then end; those that wait do not begin.
    assert {path.name for path in tmp_path.glob("begun-*")} <= {"begun-0", "begun-1", "begun-2"}


def test_a_users_mistake_is_the_stages_error(tmp_path: Path, shown: list[int]) -> None:
    with pytest.raises(UserError, match="Mend it"):
        run_count(tmp_path, Threads(2), "auto", {8: UserError("Mend it.")})


@pytest.mark.parametrize(("uses_gpu", "gpus", "expected"), [(True, 4, 4), (True, 0, 64), (False, 4, 64)])
def test_window_follows_the_size_of_a_ray_cluster(
    uses_gpu: bool, gpus: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from prefect_ray import RayTaskRunner

    there = {"CPU": 64.0, "GPU": float(gpus)}
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    stage = plain_stage("x", COUNT.shards, COUNT.fingerprint, COUNT.run, uses_gpu)
    assert num_workers(stage, RayTaskRunner(), 2) == expected


def test_window_follows_the_size_of_a_dask_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect_dask import DaskTaskRunner

    runner, workers = DaskTaskRunner(), {"tcp://a:1": 8, "tcp://b:1": 4}
    monkeypatch.setattr(runner, "_client", SimpleNamespace(nthreads=lambda: workers))
    assert num_workers(COUNT, runner, 2) == 12
    workers.clear()
    assert num_workers(COUNT, runner, 2) == 2


def test_cluster_that_does_not_answer_keeps_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect_dask import DaskTaskRunner

    def fails() -> None:
        raise OSError("connection lost")

    runner = DaskTaskRunner()
    monkeypatch.setattr(runner, "_client", SimpleNamespace(nthreads=fails))
    assert num_workers(COUNT, runner, 12) == 12


class CountingRunner(ThreadPoolTaskRunner[Any]):
    """Prefect's own; notes how many batches are submitted and unfinished."""

    def __init__(self, max_workers: int) -> None:
        super().__init__(max_workers=max_workers)
        self.unfinished, self.most_unfinished = set[Any](), 0

    def submit(self, *arguments: Any, **named: Any) -> Any:
        future = super().submit(*arguments, **named)
        self.unfinished.add(future)
        future.add_done_callback(self.unfinished.discard)
        self.most_unfinished = max(self.most_unfinished, len(self.unfinished))
        return future


@flow
def count_flow(folder: str, size: ShardsPerTask = "auto", bad_shard: int = -1) -> int:
    recipe = {bad_shard: UserError("Mend it.")}
    with CountingRunner(2) as runner:
        run_stage(COUNT, DatasetDir(Path(folder)), recipe, StageOptions(2, size), runner)
    return runner.most_unfinished


@pytest.mark.slow
def test_prefect_runs_the_batches_within_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    with prefect_test_harness(server_startup_timeout=120):
        for number, size in enumerate((5, "auto")):
            (tmp_path / str(number)).mkdir()
            assert 2 <= count_flow(str(tmp_path / str(number)), size) <= 2 * WINDOW_PER_WORKER
            assert len(list((tmp_path / str(number) / "manifest" / "count").glob("*.json"))) == NUM_SHARDS
        (tmp_path / "bad").mkdir()
        failed = count_flow(str(tmp_path / "bad"), 10, 31, return_state=True)
        assert "Mend it." in str(failed.message)
        assert len(list((tmp_path / "bad" / "manifest" / "count").glob("*.json"))) == NUM_SHARDS - 9
        with get_client(sync_client=True) as client:
            bars = [artifact.description for artifact in client.read_artifacts() if artifact.type == "progress"]
    assert "count: 60 of 60 shards" in bars
