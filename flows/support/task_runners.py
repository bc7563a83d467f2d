"""Task runners for the batches of a stage: threads, processes, Dask or Ray."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import resource_tracker
from typing import Any, Literal
from urllib.parse import urlsplit

from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from flows.support.process_tree import ends_new_children
from sdtrain.errors import UserError

Engine = Literal["threads", "processes", "dask", "ray"]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@contextmanager
def start_engine(engine: Engine, address: str | None, workers: int) -> Iterator[TaskRunner[Any]]:
    """Gives a started task runner for the stages; what was started for it ends with the block.

    Left by a cancellation, the block ends the processes that batches on this machine have started. Must be called in a
    flow, in the main thread.

    Args:
        engine: what runs the batches.
        address: a running cluster's, for Dask and Ray; without, one is started on this machine.
        workers: batches at once, unless a running cluster decides that.

    Raises:
        UserError: the engine is not installed, takes no address, or nobody answers there.
    """
    if engine == "threads":
        _refuse_address(engine, address)
        started: AbstractContextManager[TaskRunner[Any]] = ThreadPoolTaskRunner(max_workers=workers)
    else:
        started = _in_other_processes(engine, address, workers)
    with started as runner, ends_new_children():
        yield runner


def lost_its_worker(error: BaseException) -> bool:
    """Whether a batch ended because the process or the machine that ran it did."""
    if any(kind.__name__ == "RayTaskError" for kind in type(error).__mro__):
        return False  # Ray's name for whatever a batch raises
    return isinstance(error, BrokenProcessPool) or type(error).__module__.partition(".")[0] in ("ray", "distributed")


@contextmanager
def _in_other_processes(engine: Engine, address: str | None, workers: int) -> Iterator[TaskRunner[Any]]:
    if engine == "processes":
        _refuse_address(engine, address)
        # Began before the batches do, because it ends no sooner than this process, also if the flow is cancelled.
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
    """Tells the workers where this run's Prefect server is; each would start a temporary one of its own."""
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
    """Called in each worker process, which otherwise would wait for work for ever if the flow was killed."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
