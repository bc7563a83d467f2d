"""Runs a child process and leaves no process of its tree behind."""

import math
import os
import queue
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from sdtrain.errors import UserError
from sdtrain.redaction import without_secrets

GRACE_S = 20.0
"""From SIGTERM to SIGKILL; with the wait after that, less than the 30 s that Prefect gives a cancelled run."""

_MARK = "SDTRAIN_LAUNCH"


def run_tree(
    command: Sequence[str | Path],
    log_file: Path,
    on_line: Callable[[str], None] = lambda line: None,
    environment: Mapping[str, str] | None = None,
    grace_s: float = GRACE_S,
    timeout_s: float = math.inf,
) -> int:
    """Runs `command` in the main thread and returns its exit code; UserError if there is no such program.

    Output is redacted, appended to `log_file` and passed by line to `on_line`. When this returns or raises (as Prefect
    does in the main thread on cancellation) no process of the tree is left, orphans included. The child stays in our
    process group, so that a signal to the group reaches it even if we are killed.

    Raises:
        TimeoutError: it ran for `timeout_s`.
    """
    mark = uuid.uuid4().hex
    log_file.parent.mkdir(parents=True, exist_ok=True)
    process = _start(command, {**os.environ, **(environment or {}), _MARK: mark})
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    reader = threading.Thread(target=_read_lines, args=(process, log_file, lines), daemon=True)
    reader.start()
    try:
        _forward_until_exit(process, lines, on_line, time.monotonic() + timeout_s)
    finally:
        with _signals_wait():
            end_processes(_family(process, mark), grace_s)
            reader.join(timeout=5)
    lines.put(None)
    while (line := lines.get()) is not None:
        on_line(line)
    return process.wait()


@contextmanager
def ends_new_children() -> Iterator[None]:
    """Ends children started in the block if it is cancelled, so that threads waiting for them do not delay the end."""
    before = set(psutil.Process().children(recursive=True))
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception):
            with _signals_wait():
                end_processes(set(psutil.Process().children(recursive=True)) - before, GRACE_S / 2)
        raise


def end_processes(processes: set[psutil.Process], grace_s: float) -> None:
    """Terminates the processes, waits, and kills the rest."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)


def _start(command: Sequence[str | Path], environment: Mapping[str, str]) -> "subprocess.Popen[str]":
    try:
        return subprocess.Popen(  # noqa: S603 (no shell, and the arguments are ours)
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            bufsize=1,
            env=environment,
        )
    except OSError as error:
        raise UserError(f"{command[0]} could not be started: {error.strerror}. Is it installed?") from error


def _read_lines(process: "subprocess.Popen[str]", log_file: Path, lines: "queue.SimpleQueue[str | None]") -> None:
    with suppress(OSError), log_file.open("a", buffering=1) as log:
        for output in process.stdout or ():
            line = without_secrets(output)  # launchers print their commands
            lines.put(line.rstrip("\n"))
            with suppress(OSError):  # a full disk must not stop the child at its next print
                log.write(line)
    lines.put(None)


def _forward_until_exit(
    process: "subprocess.Popen[str]",
    lines: "queue.SimpleQueue[str | None]",
    on_line: Callable[[str], None],
    deadline: float,
) -> None:
    """Returns when the child has ended, even if its children hold the pipe open."""
    while process.poll() is None:
        if time.monotonic() >= deadline:
            raise TimeoutError
        with suppress(queue.Empty):
            line = lines.get(timeout=0.2)
            if line is None:
                _wait(process, deadline)
                lines.put(None)
                return
            on_line(line)


def _wait(process: "subprocess.Popen[str]", deadline: float) -> None:
    try:
        process.wait(None if deadline == math.inf else max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired as error:
        raise TimeoutError from error


def _family(process: "subprocess.Popen[str]", mark: str) -> set[psutil.Process]:
    """The child, its descendants, and orphans, which the mark in their environment identifies."""
    family: set[psutil.Process] = set()
    if process.returncode is None:
        with suppress(psutil.NoSuchProcess):
            child = psutil.Process(process.pid)
            family |= {child, *child.children(recursive=True)}
    for other in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if other.environ().get(_MARK) == mark:
                family.add(other)
    return family


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Defers a second Ctrl-C or SIGTERM while the tree ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)
