"""The box's directory and the lock that its supervisor holds."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sdtrain.errors import UserError

ROOT = Path(__file__).parents[2]
DEFAULT_PORT = 4200
LARGEST_PORT = 65535


@dataclass(frozen=True)
class BoxDir:
    """The box's directory, with all of its state but no datasets."""

    root: Path

    @property
    def logs(self) -> Path:
        """One log for each process."""
        return self.root / "logs"

    @property
    def cluster(self) -> Path:
        """PostgreSQL's files, owned by its user."""
        return self.root / "postgres"

    @property
    def passfile(self) -> Path:
        """The database password, readable by its owner only."""
        return self.root / "pgpass"

    @property
    def home(self) -> Path:
        """Prefect's home, so that the box neither needs nor touches yours."""
        return self.root / "prefect"

    @property
    def lock(self) -> Path:
        """Locked while the box runs; contains the supervisor's process id."""
        return self.root / "lock"

    @property
    def ready(self) -> Path:
        """Exists while everything is up; contains the page's address."""
        return self.root / "ready"

    @property
    def variables(self) -> Path:
        """A file for shells to source."""
        return self.root / "env"

    @property
    def deployments(self) -> Path:
        """The repository's prefect.yaml, with the box's pools."""
        return self.root / "prefect.yaml"

    def log(self, name: str) -> Path:
        """The log of one process."""
        return self.logs / f"{name}.log"


@dataclass(frozen=True)
class Box:
    """A deployment on this machine; `port` is of Prefect's page and API on 127.0.0.1."""

    directory: BoxDir
    port: int = DEFAULT_PORT

    @property
    def page(self) -> str:
        """The address for a browser."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def api(self) -> str:
        """The address for programs."""
        return f"{self.page}/api"


def box_of_environment() -> Box:
    """The box of SDTRAIN_STATE and SDTRAIN_PORT (UserError if no port), by default .sdtrain-box here and port 4200."""
    root = Path(os.environ.get("SDTRAIN_STATE") or ROOT / ".sdtrain-box").absolute()
    port = os.environ.get("SDTRAIN_PORT") or str(DEFAULT_PORT)
    if not port.isdecimal() or not 0 < int(port) <= LARGEST_PORT:
        raise UserError(f"SDTRAIN_PORT={port} is no port. Give a number from 1 to {LARGEST_PORT}, such as 4200.")
    return Box(BoxDir(root), int(port))


@contextmanager
def lock_box(directory: BoxDir) -> Iterator[None]:
    """Takes the box's lock, which the kernel releases however this process ends; UserError if another holds it."""
    with directory.lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"The box in {directory.root} is already up. `make down` ends it.") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def supervisor_pid(directory: BoxDir) -> int | None:
    """Process id of the running supervisor; None if the box is down."""
    if not directory.lock.exists():
        return None
    with directory.lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.read() or 0) or None
    return None
