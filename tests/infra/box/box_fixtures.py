"""A whole box for tests: `make up` and `make down` as a user says them, in a directory that PostgreSQL may enter."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from infra.box.layout import BoxDir
from infra.box.services import SERVICE_MARK, marked
from tests.flows.server_fixtures import ROOT, Environment, free_port, state_of

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class LiveBox:
    """A box, and what a shell beside it has set."""

    directory: BoxDir
    environment: Environment
    """As after `source STATE/env`."""
    own: Environment
    """What `make up` is called with."""

    def make(self, target: str, fails: bool = False) -> str:
        """Output of `make up` or `make down`; pytest's environment stands for the one that make would set up."""
        command = [sys.executable, "-m", "infra.box", target]
        done = subprocess.run(command, cwd=ROOT, env=self.own, capture_output=True, text=True, timeout=400)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr + self.log("supervisor")
        return done.stdout + done.stderr

    def log(self, name: str) -> str:
        path = self.directory.log(name)
        return path.read_text(errors="replace") if path.exists() else ""

    def processes(self, service: str | None = None) -> set[psutil.Process]:
        return marked(self.directory.root, service)

    def process_of(self, service: str) -> psutil.Process:
        """The service's own process: the one that the supervisor started."""
        supervisor = int(self.directory.lock.read_text())
        for child in psutil.Process(supervisor).children():
            if child.environ().get(SERVICE_MARK) == service:
                return child
        raise AssertionError(f"no {service}")


@contextmanager
def new_box() -> Iterator[LiveBox]:
    """A box that is not up yet; down, and gone, at the end."""
    root = Path(tempfile.mkdtemp(prefix="sdtrain-box-"))
    root.chmod(0o711)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "SDTRAIN_"))}
    port = free_port()
    own = {**clean, "SDTRAIN_STATE": str(root), "SDTRAIN_PORT": str(port), "NO_ALBUMENTATIONS_UPDATE": "1"}
    outside = {
        **clean,
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_HOME": str(root / "client"),
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "PREFECT_PLUGINS_ENABLED": "true",
        "PREFECT_CLI_COLORS": "false",
        "DO_NOT_TRACK": "1",
        "COLUMNS": "200",
    }
    box = LiveBox(BoxDir(root), outside, own)
    try:
        yield box
    finally:
        box.make("down")
        assert box.processes() == set()
        shutil.rmtree(root)


def seconds_until(holds: Callable[[], bool], limit_s: float) -> float:
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < limit_s, f"not within {limit_s} s"
        time.sleep(0.2)
    return time.monotonic() - started


def seconds_until_crashed(box: LiveBox, run: str) -> float:
    """How long a run takes to be Crashed; two minutes at most."""
    took = seconds_until(lambda: state_of(box.environment, run)[0] == "CRASHED", 120)
    print(f"Crashed after {took:.1f} s: {state_of(box.environment, run)[1]}")
    return took
