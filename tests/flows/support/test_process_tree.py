import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.support.process_tree import end_processes, ends_new_children, run_tree
from sdtrain.errors import UserError

SLEEPS = "import time; time.sleep(600)"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def processes_with(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if mark in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.pid != os.getpid()]


@pytest.fixture
def mark(tmp_path: Path) -> str:
    """Stands in the command line of every process of the test."""
    return f"mark-{tmp_path.name}-{os.getpid()}"


def test_exit_code_lines_and_log_come_back(tmp_path: Path) -> None:
    lines: list[str] = []
    code = run_tree(python("print('one'); print('two'); raise SystemExit(3)"), tmp_path / "log", lines.append)
    assert (code, lines) == (3, ["one", "two"])
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


def test_log_of_a_second_run_is_appended(tmp_path: Path) -> None:
    for word in ("first", "second"):
        run_tree(python(f"print('{word}')"), tmp_path / "deep" / "log")
    assert (tmp_path / "deep" / "log").read_text() == "first\nsecond\n"


def test_undecodable_output_and_a_last_line_without_newline_pass(tmp_path: Path) -> None:
    lines: list[str] = []
    code = "import sys; sys.stdout.buffer.write(b'\\xff\\nend')"
    assert run_tree(python(code), tmp_path / "log", lines.append) == 0
    assert lines == ["\ufffd", "end"]


def test_program_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be started"):
        run_tree(["/no/such/program"], tmp_path / "log")


def test_interrupt_ends_children_and_grandchildren(tmp_path: Path, mark: str) -> None:
    child = (
        f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', '{SLEEPS}', '{mark}'])\n"
        f"print('up', flush=True)\n{SLEEPS}"
    )

    def interrupt(line: str) -> None:
        # For a moment after it has begun, a process has no command line yet.
        deadline = time.monotonic() + 5
        while len(processes_with(mark)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(processes_with(mark)) == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tree([*python(child), mark], tmp_path / "log", interrupt)
    assert processes_with(mark) == []


def test_orphan_in_its_own_session_is_ended_when_its_parent_exits(tmp_path: Path, mark: str) -> None:
    child = (
        f"import subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', '{SLEEPS}', '{mark}'], start_new_session=True)"
    )
    assert run_tree(python(child), tmp_path / "log") == 0
    assert processes_with(mark) == []


def test_child_that_ignores_sigterm_is_killed(tmp_path: Path, mark: str) -> None:
    child = f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\n{SLEEPS}"

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_tree([*python(child), mark], tmp_path / "log", interrupt, grace_s=0.3)
    assert processes_with(mark) == []
    assert time.monotonic() - started < 10


def test_second_interrupt_does_not_leave_the_child_behind(tmp_path: Path, mark: str) -> None:
    """In a process of its own, because it is sent SIGINT twice."""
    child = f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\n{SLEEPS}"
    (tmp_path / "child.py").write_text(child)
    parent = (
        "import sys\nfrom pathlib import Path\nfrom flows.support.process_tree import run_tree\n"
        f"run_tree([sys.executable, {str(tmp_path / 'child.py')!r}, '{mark}'], Path({str(tmp_path / 'log')!r}),"
        " lambda line: print(line, flush=True), grace_s=1)"
    )
    process = subprocess.Popen(
        python(f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{parent}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) != 0
    process.stdout.close()
    assert processes_with(mark) == []


def test_cancelled_block_ends_only_the_children_that_it_started(mark: str) -> None:
    earlier = subprocess.Popen(python(SLEEPS))
    try:
        with pytest.raises(KeyboardInterrupt):
            start_and_raise(KeyboardInterrupt(), started := [], mark)
        assert started[0].wait(timeout=5) is not None
        assert earlier.poll() is None
    finally:
        end_processes({psutil.Process(earlier.pid)}, grace_s=5)
        earlier.wait()


def test_block_that_fails_leaves_its_children_alone() -> None:
    with pytest.raises(ValueError, match="bad"):
        start_and_raise(ValueError("bad"), started := [], "")
    assert started[0].poll() is None
    started[0].kill()
    started[0].wait()


def start_and_raise(error: BaseException, started: list[subprocess.Popen[bytes]], mark: str) -> None:
    with ends_new_children():
        started.append(subprocess.Popen([*python(SLEEPS), mark]))
        raise error


@pytest.mark.parametrize("closing", ["", "os.close(1); os.close(2)"], ids=["with output", "output closed"])
def test_a_tree_that_runs_too_long_is_ended(tmp_path: Path, mark: str, closing: str) -> None:
    child = f"""
import os, subprocess, sys, time
quiet = {{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}}
subprocess.Popen([sys.executable, "-c", {SLEEPS!r}, {mark!r}], **quiet)
{closing}
time.sleep(600)
"""
    with pytest.raises(TimeoutError):
        run_tree([*python(child), mark], tmp_path / "log", grace_s=0.3, timeout_s=1.5)
    assert not processes_with(mark)
