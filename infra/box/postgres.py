"""Runs the box's own PostgreSQL, from system packages, on loopback with a password."""

import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from flows.support.process_tree import end_processes
from infra.box.layout import BoxDir
from infra.box.services import Program
from sdtrain.errors import UserError

USER = DATABASE = "prefect"
OLDEST = 14
"""The oldest release that Prefect supports."""

_DEBIAN = Path("/usr/lib/postgresql")
_SYSTEM_USER = "postgres"
_SHUTDOWN_S = 30.0


@dataclass(frozen=True)
class Postgres:
    """The box's database server, on a new port of 127.0.0.1 at each start.

    `system_user` is the user to run as; None for the caller, unless root, which PostgreSQL refuses.
    """

    directory: BoxDir
    programs: Path
    port: int
    system_user: str | None

    @property
    def url(self) -> str:
        """For Prefect's server; the password comes from PGPASSFILE."""
        return f"postgresql+asyncpg://{USER}@127.0.0.1:{self.port}/{DATABASE}"

    @property
    def environment(self) -> dict[str, str]:
        """Points clients to the password file."""
        return {"PGPASSFILE": str(self.directory.passfile)}

    @property
    def program(self) -> Program:
        """The server; SIGINT is its fast shutdown, without waiting for clients."""
        options = {"listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": ""}
        flags = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        command: list[str | Path] = [self.programs / "postgres", "-D", self.directory.cluster, *flags]
        return Program("postgres", command, user=self.system_user, stop_signal=signal.SIGINT, grace_s=_SHUTDOWN_S)

    def prepare(self) -> None:
        """Creates the cluster if missing, and ends a server left by a killed box; UserError if it cannot be created."""
        _end_leftover(self.directory.cluster)
        if not (self.directory.cluster / "PG_VERSION").exists():
            self._make_cluster()
        try:
            password = self.directory.passfile.read_text().strip().rpartition(":")[2]
        except OSError:
            password = ""
        if not password:
            raise UserError(
                f"{self.directory.passfile} holds no password for the database in {self.directory.cluster}. Put it "
                "back from a copy, or move the directory away to begin with an empty history."
            )
        _write_secret(self.directory.passfile, f"127.0.0.1:{self.port}:*:{USER}:{password}\n")

    def is_ready(self) -> bool:
        """Whether it answers."""
        command: list[str | Path] = [self.programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command, check=False).returncode == 0  # noqa: S603

    def make_database(self) -> None:
        """Creates Prefect's database if missing; the server must run."""
        common = ["-h", "127.0.0.1", "-p", str(self.port), "-U", USER, "-w"]
        query = f"SELECT 1 FROM pg_database WHERE datname = '{DATABASE}'"  # noqa: S608 (a constant)
        existing = self._run([self.programs / "psql", *common, "-d", "postgres", "-tAc", query])
        if not existing.strip():
            self._run([self.programs / "createdb", *common, DATABASE])

    def _make_cluster(self) -> None:
        # Under another name until complete: initdb writes PG_VERSION first.
        made = self.directory.cluster.with_name(f".{self.directory.cluster.name}.new")
        for half_made in (made, self.directory.cluster):
            shutil.rmtree(half_made, ignore_errors=True)
        made.mkdir(mode=0o700)
        password = secrets.token_urlsafe(32)
        with tempfile.NamedTemporaryFile("w") as file:  # readable by its owner only
            file.write(password + "\n")
            file.flush()
            if self.system_user is not None:
                shutil.chown(made, self.system_user)
                os.chown(file.name, pwd.getpwnam(self.system_user).pw_uid, -1)
            options = ["--auth=scram-sha-256", f"--pwfile={file.name}", "--encoding=UTF8", "--locale=C.UTF-8"]
            self._run([self.programs / "initdb", "-D", made, "-U", USER, *options], self.system_user)
        _write_secret(self.directory.passfile, f"127.0.0.1:{self.port}:*:{USER}:{password}\n")
        made.rename(self.directory.cluster)

    def _run(self, command: list[str | Path], user: str | None = None) -> str:
        done = subprocess.run(  # noqa: S603
            [str(part) for part in command],
            env={**os.environ, **self.environment},
            user=user,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise UserError(
                f"PostgreSQL's {Path(command[0]).name} failed: {done.stderr.strip() or done.stdout.strip()}"
            )
        return done.stdout


def find_postgres(directory: BoxDir, port: int) -> Postgres:
    """Finds the installed PostgreSQL of the cluster's release, else the newest.

    UserError if it is missing, too old, of another release than the cluster, or cannot enter its folder.
    """
    releases = _releases()
    marker = directory.cluster / "PG_VERSION"
    if marker.exists():
        release = int(marker.read_text())
        if release not in releases:
            raise UserError(
                f"{directory.cluster} was made by PostgreSQL {release}, which is not installed any more. Run `apt-get "
                f"install postgresql-{release}`, or move the data on with pg_upgrade, or choose another SDTRAIN_STATE."
            )
    elif not releases:
        raise UserError(f"PostgreSQL {OLDEST} or newer is missing. Run `apt-get install postgresql`, then again.")
    else:
        release = max(releases)
    return Postgres(directory, releases[release], port, _system_user(directory))


def _releases() -> dict[int, Path]:
    found = {int(folder.parent.name): folder for folder in _DEBIAN.glob("[0-9]*/bin") if (folder / "initdb").exists()}
    on_path = shutil.which("initdb")
    if on_path and not found:
        shown = subprocess.run([on_path, "--version"], capture_output=True, text=True, check=False).stdout  # noqa: S603
        if match := re.search(r"(\d+)", shown):
            found[int(match.group(1))] = Path(on_path).resolve().parent
    return {release: folder for release, folder in found.items() if release >= OLDEST}


def _system_user(directory: BoxDir) -> str | None:
    """The user to run PostgreSQL as; None for the caller."""
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam(_SYSTEM_USER)
    except KeyError:
        raise UserError(f"PostgreSQL refuses root, and there is no user {_SYSTEM_USER}. Run as another user.") from None
    for folder in (directory.root, *directory.root.parents):
        if not folder.stat().st_mode & 0o001:
            raise UserError(
                f"PostgreSQL runs as user {_SYSTEM_USER}, who cannot enter {folder}. Choose another directory "
                "(SDTRAIN_STATE=/var/lib/sdtrain make up), or do not run this as root."
            )
    return _SYSTEM_USER


def _end_leftover(cluster: Path) -> None:
    """Ends a server on `cluster` whose supervisor was killed."""
    server = None
    with suppress(OSError, ValueError, IndexError, psutil.Error):  # gone, or its id reused by another user
        found = psutil.Process(int((cluster / "postmaster.pid").read_text().splitlines()[0]))
        if found.name().startswith("postgres") and found.cwd() == str(cluster.resolve()):
            server = found
    if server is not None:
        with suppress(psutil.NoSuchProcess):
            server.send_signal(signal.SIGINT)
            psutil.wait_procs([server], timeout=_SHUTDOWN_S)
        end_processes({server}, grace_s=1)


def _write_secret(path: Path, text: str) -> None:
    """Writes a file that is never readable by others."""
    temporary = path.with_name(f".{path.name}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # it is the only copy
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
