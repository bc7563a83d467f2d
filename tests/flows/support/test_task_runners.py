"""What an engine refuses, and in which words; what can be sent to its workers. Real engines run in test_clusters.py."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prefect.logging import disable_run_logger
from prefect.states import State

from filters.pipeline import STAGES
from filters.score.stage import SCORE
from flows.build_dataset import build_dataset
from flows.support import clusters
from flows.support.clusters import needs_of, start_dask, start_ray
from flows.support.stage_runner import _error
from flows.support.task_runners import Engine, lost_its_worker, start_engine
from sdtrain.dataset.stage import Stage
from sdtrain.download.stage import DOWNLOAD
from sdtrain.errors import UserError


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """HOST:PORT where nobody listens."""
    monkeypatch.setattr(clusters, "ANSWER_S", 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def mute(monkeypatch: pytest.MonkeyPatch) -> Any:
    """HOST:PORT where connections are taken and nothing is said."""
    monkeypatch.setattr(clusters, "ANSWER_S", 1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_parameter_offers_the_engines_and_threads_are_the_default() -> None:
    schema = build_dataset.parameters.model_dump()["properties"]["engine"]
    assert schema["enum"] == list(get_args(Engine)) == ["threads", "processes", "dask", "ray"]
    assert schema["default"] == "threads"


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_stage_is_sent_to_workers_by_the_names_of_its_functions(stage: Any) -> None:
    sent = pickle.dumps(stage)
    assert pickle.loads(sent) == stage
    assert len(sent) < 300


@pytest.mark.parametrize("engine", ["threads", "processes"])
def test_engine_of_this_machine_takes_no_address(engine: Engine) -> None:
    with pytest.raises(UserError, match="has no address"), start_engine(engine, "tcp://10.0.0.1:8786", 1):
        pass


@pytest.mark.parametrize(("start", "extra"), [(start_dask, "dask"), (start_ray, "ray")])
def test_missing_extra_is_a_sentence_with_the_command(
    start: Callable[..., Any], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install -e '\.\[{extra}\]'"), start(None, 1):
        pass


@pytest.mark.parametrize("server", ["nobody", "mute"])
@pytest.mark.parametrize(("start", "form"), [(start_dask, "tcp://{}"), (start_ray, "{}"), (start_ray, "ray://{}")])
def test_address_that_does_not_answer_is_a_sentence(
    start: Callable[..., Any], form: str, server: str, request: pytest.FixtureRequest
) -> None:
    address = form.format(request.getfixturevalue(server))
    with pytest.raises(UserError, match=f"answers at {address} within 1 seconds"), start(address, 1):
        pass


@pytest.mark.parametrize(("start", "address"), [(start_dask, "nonsense://x"), (start_ray, "no port")])
def test_malformed_address_is_a_sentence(start: Callable[..., Any], address: str, nobody: str) -> None:
    with pytest.raises(UserError, match=f"answers at {address} within"), start(address, 1):
        pass


def test_auto_means_the_ray_of_the_environment(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", nobody)
    with pytest.raises(UserError, match=f"answers at {nobody} within"), start_ray("auto", 1):
        pass


def test_flow_fails_with_the_sentence(nobody: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"URL": ["https://a.example/1.jpg"], "TEXT": ["a"]}), tmp_path / "metadata.parquet")
    with disable_run_logger():
        ended = build_dataset.fn(
            metadata=str(tmp_path / "metadata.parquet"),
            output=str(tmp_path / "data"),
            engine="dask",
            engine_address=f"tcp://{nobody}",
        )
    assert isinstance(ended, State)
    assert ended.is_failed()
    assert "No Dask scheduler answers" in str(ended.message)


@pytest.mark.parametrize(("stage", "gpus", "asked"), [(SCORE, 8, 1), (SCORE, 0, None), (DOWNLOAD, 8, None)])
def test_gpu_is_asked_for_where_ray_has_some_and_the_stage_uses_one(
    stage: Stage[Any], gpus: int, asked: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect_ray.context import RemoteOptionsContext

    ray = SimpleNamespace(is_initialized=lambda: True, cluster_resources=lambda: {"CPU": 8, "GPU": gpus})
    monkeypatch.setitem(sys.modules, "ray", ray)
    with needs_of(stage):
        assert RemoteOptionsContext.get().current_remote_options.get("num_gpus") == asked


def test_lost_worker_is_a_sentence_and_a_fault_of_the_code_is_not() -> None:
    from distributed import KilledWorker
    from ray.exceptions import RayTaskError, WorkerCrashedError

    lost = [BrokenProcessPool("gone"), KilledWorker("score", SimpleNamespace(address="x"), 3), WorkerCrashedError()]
    assert all(map(lost_its_worker, lost))
    faults = [KeyError("x"), RayTaskError("f", "Traceback\nKeyError: 'x'", KeyError("x"))]
    assert not any(map(lost_its_worker, faults))
    assert "score: 1 of 4 batches failed, because a worker ended" in str(_error("score", lost[:1], 4))
    assert isinstance(_error("score", lost[:1], 4), UserError)
    assert not isinstance(_error("score", [faults[1]], 4), UserError)
    assert "KeyError: 'x'" in str(_error("score", [faults[1]], 4))
    assert str(_error("score", [*faults, UserError("Mend it.")], 4)) == "Mend it."


def test_ray_leaves_the_signal_handler_that_ends_a_cancelled_run() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with clusters._keeps_handler_of_sigterm():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is before


ORPHAN = """
import multiprocessing, os, signal, sys, time
from flows.support.task_runners import _end_with_parent

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = context.Pool(1, _end_with_parent)
    print(pool.apply(os.getpid), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_worker_process_ends_when_the_flow_was_killed(tmp_path: Path) -> None:
    import psutil

    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, timeout=60)
    pid = int(done.stdout)
    with_deadline = threading.Event()
    for _ in range(100):
        if not psutil.pid_exists(pid):
            return
        with_deadline.wait(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the worker process outlived the flow")
