"""Starts Dask or Ray on this machine, or connects to a running cluster."""

import importlib.util
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from typing import Any
from urllib.parse import urlsplit

from prefect.task_runners import TaskRunner

from sdtrain.dataset.stage import Stage
from sdtrain.errors import UserError

ANSWER_S = 10
"""Timeout for a running cluster to answer."""
_DASK_PORT = 8786
_OBJECT_STORE_BYTES = 100 * 2**20  # holds reports, no images


@contextmanager
def start_dask(address: str | None, workers: int) -> Iterator[TaskRunner[Any]]:
    """Yields a task runner on the Dask cluster at `address`, or on a new one with `workers` workers."""
    _check_installed("dask", "prefect_dask", "distributed")
    import distributed
    from prefect_dask import DaskTaskRunner

    logging.getLogger("distributed").setLevel(logging.WARNING)
    if address is not None:
        try:
            _check_dask_answers(address)
            distributed.Client(address, timeout=ANSWER_S, set_as_default=False).close()
        except (OSError, ValueError) as error:
            raise _no_answer("Dask scheduler", address, "tcp://HOST:8786") from error
        with DaskTaskRunner(address=address) as runner:
            yield runner
        return
    with tempfile.TemporaryDirectory(prefix="sdtrain-dask-") as scratch:
        options: dict[str, Any] = {
            "n_workers": workers,
            "threads_per_worker": 1,
            "dashboard_address": None,
            "local_directory": scratch,
        }
        options["env"] = {"DASK_LOGGING__DISTRIBUTED": "warning"}
        # No memory limit: Dask would stop a worker that holds a large model.
        with distributed.LocalCluster(memory_limit=0, **options) as cluster, DaskTaskRunner(cluster=cluster) as runner:
            yield runner


@contextmanager
def start_ray(address: str | None, workers: int) -> Iterator[TaskRunner[Any]]:
    """Yields a task runner on the Ray cluster at `address`, or on a new one with `workers` workers."""
    _check_installed("ray", "prefect_ray", "ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from prefect_ray import RayTaskRunner

    if address is None:
        options: dict[str, Any] = {"address": "local", "num_cpus": workers, "include_dashboard": False}
        options |= {"object_store_memory": _OBJECT_STORE_BYTES}
    else:
        _check_ray_answers(address)
        options = {"address": address}
    with _keeps_handler_of_sigterm():
        try:
            ray.init(log_to_driver=False, **options)
        except (ConnectionError, RuntimeError, ValueError, SystemExit) as error:
            raise UserError(f"Ray at {address or 'this machine'} cannot be used: {error}") from error
    try:
        with RayTaskRunner() as runner:
            yield runner
    finally:
        ray.shutdown()


def needs_of(stage: Stage[Any]) -> AbstractContextManager[Any]:
    """Context for submitting batches; those of a GPU stage request one GPU each from Ray."""
    ray = sys.modules.get("ray")
    if not stage.uses_gpu or ray is None or not ray.is_initialized():
        return nullcontext()
    if not ray.cluster_resources().get("GPU"):
        return nullcontext()
    from prefect_ray.context import remote_options

    # By default Ray starts a process per GPU task, and each would reload the models.
    return remote_options(num_gpus=1, max_calls=0)


def num_workers(stage: Stage[Any], runner: TaskRunner[Any], otherwise: int) -> int:
    """Batches that run at once: a cluster's threads or CPUs now, or its GPUs for a stage that asks for one.

    `otherwise` is the answer for threads and processes, and for a cluster without workers or that does not answer.
    """
    try:
        return _num_slots(stage, runner) or otherwise
    except Exception:  # of Ray or Dask, or the connection's: the batches themselves tell how they fail
        return otherwise


def _num_slots(stage: Stage[Any], runner: TaskRunner[Any]) -> int:
    package = type(runner).__module__.partition(".")[0]
    if package == "prefect_ray":
        there = sys.modules["ray"].cluster_resources()
        return int(stage.uses_gpu and there.get("GPU", 0)) or int(there.get("CPU", 0))
    if package == "prefect_dask":
        return sum(runner.client.nthreads().values())  # type: ignore[attr-defined]
    return 0


def is_given_up() -> bool:
    """Whether this Dask batch's flow has ended; Dask does not stop running batches."""
    distributed = sys.modules.get("distributed")
    try:
        worker = distributed.get_worker() if distributed else None
    except ValueError:
        return False
    if worker is None:
        return False
    task = worker.state.tasks.get(worker.get_current_task())
    return task is None or task.state == "cancelled"


def _check_installed(engine: str, *packages: str) -> None:
    if not all(importlib.util.find_spec(name) for name in packages):
        raise UserError(
            f"Engine '{engine}' is an extra that is not installed. In the repository: pip install -e '.[{engine}]'; "
            "the machines of a cluster need it too."
        )


def _check_dask_answers(address: str) -> None:
    """Probes the address first: the client waits for ever for a server that is no scheduler."""
    parts = urlsplit(address if "://" in address else f"tcp://{address}")
    if parts.scheme not in ("tcp", "tls"):
        return
    with socket.create_connection((parts.hostname, parts.port or _DASK_PORT), timeout=ANSWER_S) as connection:
        if parts.scheme == "tcp" and not connection.recv(1):
            raise ConnectionError("closed without a word")


def _check_ray_answers(address: str) -> None:
    """Probes the address first: `ray.init` waits two minutes and then ends the process."""
    import grpc

    wanted = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    if wanted == "auto":
        return
    place = wanted.removeprefix("ray://")
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
        if os.environ.get("RAY_USE_TLS", "0") == "0":
            with closing(grpc.insecure_channel(place)) as channel:
                grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
    except (OSError, ValueError, grpc.FutureTimeoutError) as error:
        raise _no_answer("Ray cluster", wanted, "HOST:6379, ray://HOST:10001 or auto") from error


def _no_answer(what: str, address: str, form: str) -> UserError:
    return UserError(
        f"No {what} answers at {address} within {ANSWER_S} seconds. Is it running, and is engine_address right "
        f"({form})? Without engine_address one is started on this machine."
    )


@contextmanager
def _keeps_handler_of_sigterm() -> Iterator[None]:
    """Restores the handler that Ray replaces and by which Prefect ends a cancelled run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
