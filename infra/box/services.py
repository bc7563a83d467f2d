"""Long-running processes of the box, whose descendants carry a mark in their environment."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from flows.support.process_tree import end_processes

BOX_MARK, SERVICE_MARK = "SDTRAIN_BOX", "SDTRAIN_BOX_SERVICE"
"""Set for every process of the box: its directory, and the service's name."""

MAX_LOG_BYTES = 50_000_000
FAMILY_GRACE_S = 20.0
_MAX_DELAY_S = 30.0
_STEADY_S = 60.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Program:
    """A service's program, which has `grace_s` to end after `stop_signal`.

    `command` must hold no secrets, since every user can read it. `environment` extends the supervisor's.
    """

    name: str
    command: Sequence[str | Path]
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    grace_s: float = 30.0


class Service:
    """A program that is restarted when it ends, with a growing delay if it fails at once."""

    def __init__(self, program: Program, box: Path, log: Path):
        self.program, self._box, self._log = program, box, log
        self._process: subprocess.Popen[bytes] | None = None
        self._delay_s, self._started, self._not_before = 1.0, 0.0, 0.0

    @property
    def is_running(self) -> bool:
        """Whether its process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the process; the kernel signals it when this one dies, even by kill -9."""
        marks = {BOX_MARK: str(self._box), SERVICE_MARK: self.program.name}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 (no shell, and the arguments are ours)
                [str(part) for part in self.program.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.program.environment, **marks},
                start_new_session=True,
                preexec_fn=lambda: _prepare(self.program.stop_signal),  # after the user change, which resets it
                user=self.program.user,
                group=None if self.program.user is None else _group(self.program.user),
                extra_groups=None if self.program.user is None else [],
            )
        self._started = time.monotonic()

    def restart_if_ended(self) -> str | None:
        """Restarts an ended process once its descendants have ended too; returns a log line."""
        if self.is_running or self._process is None or time.monotonic() < self._not_before:
            return None
        code = self._process.returncode
        end_processes(marked(self._box, self.program.name), FAMILY_GRACE_S)
        lived_s = time.monotonic() - self._started
        self._delay_s = 1.0 if lived_s > _STEADY_S else min(_MAX_DELAY_S, 2 * self._delay_s)
        self._not_before = time.monotonic() + self._delay_s
        self.start()
        return f"{self.program.name} had ended ({_describe_exit(code)}) after {lived_s:.0f} s and was started again"

    def ask_to_end(self) -> None:
        """Sends its stop signal; `end` waits."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(self.program.stop_signal)

    def end(self) -> None:
        """Waits for the process, then ends it and its remaining children."""
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(self.program.grace_s)
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
        end_processes(marked(self._box, self.program.name), FAMILY_GRACE_S)

    def trim_log(self) -> None:
        """Moves a full log to NAME.log.1, so that both stay below twice the limit."""
        if self._log.exists() and self._log.stat().st_size > MAX_LOG_BYTES:
            self._log.with_name(self._log.name + ".1").write_bytes(self._log.read_bytes())
            os.truncate(self._log, 0)  # writers append, so they continue at the new end


def marked(box: Path, service: str | None = None) -> set[psutil.Process]:
    """All running processes of the box, or of one service, except this one."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            variables = process.environ()
            ours = variables.get(BOX_MARK) == str(box) and service in (None, variables.get(SERVICE_MARK))
            if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return found


def tail(log: Path, num_lines: int = 15) -> str:
    """The end of a log, for an error message."""
    lines = log.read_text(errors="replace").splitlines()[-num_lines:] if log.exists() else []
    return f"Last lines of {log}:\n" + "\n".join(lines)


def _prepare(stop_signal: signal.Signals) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, stop_signal)
    # A background shell makes us ignore SIGINT, by which Prefect stops.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _group(user: str) -> int:
    import pwd

    return pwd.getpwnam(user).pw_gid


def _describe_exit(code: int | None) -> str:
    return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
