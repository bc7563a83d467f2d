"""Task runners for the batches of a stage (threads, processes, Dask or Ray), and their Prefect server."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_ANALYTICS_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from flows.support.process_tree import ends_new_children
from sdtrain.errors import UserError

Engine = Literal["threads", "processes", "dask", "ray"]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@contextmanager
def start_engine(engine: Engine, address: str | None, workers: int) -> Iterator[TaskRunner[Any]]:
    """Yields a task runner in a flow's main thread; its engine ends with the block.

    On cancellation it also ends the processes started by local batches. `address` is a running Dask or Ray cluster's,
    None starts one here; `workers` are concurrent batches, unless a running cluster decides. UserError if the engine is
    not installed, takes no address, or does not answer there.
    """
    if engine == "threads":
        _refuse_address(engine, address)
        started: AbstractContextManager[TaskRunner[Any]] = ThreadPoolTaskRunner(max_workers=workers)
    else:
        started = _in_other_processes(engine, address, workers)
    with started as runner, ends_new_children():
        yield runner


@contextmanager
def own_prefect(home: Path) -> Iterator[None]:
    """Runs a Prefect server of this process's own in the folder `home`, which neither needs nor touches yours."""
    home.mkdir(parents=True, exist_ok=True)
    settings = {
        PREFECT_API_URL: None,
        PREFECT_HOME: home,
        PREFECT_SERVER_ANALYTICS_ENABLED: False,
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 120,
    }
    with temporary_settings(settings):
        yield


def lost_its_worker(error: BaseException) -> bool:
    """Whether a batch failed because its process or machine died."""
    if any(kind.__name__ == "RayTaskError" for kind in type(error).__mro__):
        return False  # Ray's wrapper of any exception of a batch
    return isinstance(error, BrokenProcessPool) or type(error).__module__.partition(".")[0] in ("ray", "distributed")


@contextmanager
def _in_other_processes(engine: Engine, address: str | None, workers: int) -> Iterator[TaskRunner[Any]]:
    if engine == "processes":
        _refuse_address(engine, address)
        # Started before the batches, because it lives as long as this process, even if the flow is cancelled.
        resource_tracker.ensure_running()
        processes: AbstractContextManager[TaskRunner[Any]] = ProcessPoolTaskRunner(
            max_workers=workers, initializer=_end_with_parent
        )
    else:
        from flows.support import clusters

        processes = clusters.start_dask(address, workers) if engine == "dask" else clusters.start_ray(address, workers)
    with processes as runner, _one_prefect_server(address):
        yield runner


def _refuse_address(engine: Engine, address: str | None) -> None:
    if address is not None:
        raise UserError(
            f"Engine '{engine}' runs on this machine and has no address. Leave engine_address out, or take engine "
            "'dask' or 'ray'."
        )


@contextmanager
def _one_prefect_server(address: str | None) -> Iterator[None]:
    """Gives the workers this run's Prefect server; each would start a temporary one."""
    with get_client(sync_client=True) as client:
        url = str(client.api_url)
    if address is not None and urlsplit(url).hostname in _LOOPBACK and not any(host in address for host in _LOOPBACK):
        get_run_logger().warning(
            "Workers on other machines cannot reach the Prefect server at %s; set PREFECT_API_URL to an address of it "
            "that all machines know.",
            url,
        )
    with temporary_settings({PREFECT_API_URL: url}):
        yield


def _end_with_parent() -> None:
    """Ends a worker process with its flow; an orphan would wait for work for ever."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
