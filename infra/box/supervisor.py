"""Starts the box's services, keeps them up, and ends them on SIGTERM."""

import json
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from flows.support.process_tree import end_processes
from infra.box.bootstrap import POOLS
from infra.box.layout import Box, lock_box
from infra.box.postgres import find_postgres
from infra.box.programs import run_bootstrap, server_program, worker_program, write_variables
from infra.box.services import FAMILY_GRACE_S, Program, Service, marked, tail
from sdtrain.dataset.files import publish
from sdtrain.errors import UserError

_START_S = 180.0
_PAUSE_S = 0.5
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Bypasses proxies, since the addresses are local."""


class _Stop(BaseException):
    """SIGTERM or Ctrl-C."""


class Supervisor:
    """Starts services in order, restarts them, and stops them in reverse order."""

    def __init__(self, box: Box):
        self._box, self._services = box, list[Service]()

    def run(self) -> None:
        """Runs the box until SIGTERM or Ctrl-C, leaving no process behind; UserError if it is up or fails to start."""
        directory = self._box.directory
        directory.logs.mkdir(parents=True, exist_ok=True)
        (directory.root / ".gitignore").write_text("*\n")  # passwords and a database
        with lock_box(directory):
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, _raise_stop)
            try:
                end_processes(marked(directory.root), FAMILY_GRACE_S)  # of a killed supervisor
                self._come_up()
                self._watch()
            except _Stop:
                _log("asked to end")
            finally:
                self._end()

    def _come_up(self) -> None:
        box, directory = self._box, self._box.directory
        require_free_port(box.port)
        postgres = find_postgres(directory, _free_port())
        postgres.prepare()
        self._start(postgres.program)
        self._wait(postgres.is_ready, "postgres")
        postgres.make_database()
        self._start(server_program(box, postgres))
        self._wait(lambda: self._ask("/health") is True, "server")
        run_bootstrap(box)
        for pool in POOLS:
            self._start(worker_program(box, pool.name))
        for pool in POOLS:
            self._wait(lambda name=pool.name: self._is_online(name), f"worker-{pool.name}")  # type: ignore[misc]
        write_variables(box)
        with publish(directory.ready) as temporary:
            temporary.write_text(f"{box.page}\n")
        _log(f"up: {box.page}")

    def _watch(self) -> None:
        while True:
            for service in self._services:
                if line := service.restart_if_ended():
                    _log(line)
                service.trim_log()
            time.sleep(_PAUSE_S)

    def _end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        self._box.directory.ready.unlink(missing_ok=True)
        workers = [service for service in self._services if service.program.name.startswith("worker")]
        others = [service for service in reversed(self._services) if service not in workers]
        for group in (workers, *([service] for service in others)):
            for service in group:
                service.ask_to_end()
            for service in group:
                service.end()
        end_processes(marked(self._box.directory.root), FAMILY_GRACE_S)
        _log("ended")

    def _start(self, program: Program) -> None:
        service = Service(program, self._box.directory.root, self._box.directory.log(program.name))
        self._services.append(service)
        service.start()

    def _wait(self, is_ready: Callable[[], bool], name: str) -> None:
        deadline, log = time.monotonic() + _START_S, self._box.directory.log(name)
        service = next(service for service in self._services if service.program.name == name)
        while not is_ready():
            if not service.is_running:
                raise UserError(f"{name} ended while it was starting. {tail(log)}")
            if time.monotonic() > deadline:
                raise UserError(f"{name} was not ready within {_START_S:.0f} s. {tail(log)}")
            time.sleep(0.2)

    def _is_online(self, pool: str) -> bool:
        return any(worker["status"] == "ONLINE" for worker in self._ask(f"/work_pools/{pool}/workers/filter", {}) or ())

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._box.api + path, data, {"Content-Type": "application/json"})  # noqa: S310
        with suppress(urllib.error.URLError, OSError, ValueError), _direct.open(request, timeout=5) as answer:
            return json.load(answer)
        return None


def require_free_port(port: int) -> None:
    """Checks, before starting anything, that the page's port is free; UserError if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(
                f"Port {port} is not available ({error.strerror}); is another Prefect server running? End it, or "
                "choose another port: SDTRAIN_PORT=4201 make up."
            ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _raise_stop(*_: object) -> None:
    raise _Stop


def _log(line: str) -> None:
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {line}", flush=True)
