"""`python -m infra.box up`, `down`, `deploy`, `status` and `run`, for the box of SDTRAIN_STATE and SDTRAIN_PORT."""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from flows.support.command_line import exit_code_of
from flows.support.process_tree import end_processes
from infra.box.layout import ROOT, Box, box_of_environment, supervisor_pid
from infra.box.programs import run_bootstrap
from infra.box.services import FAMILY_GRACE_S, marked
from infra.box.supervisor import Supervisor
from sdtrain.errors import UserError

_UP_S, _DOWN_S = 300.0, 180.0


def up(box: Box) -> None:
    """Starts the box in the background unless it is up; returns when it is healthy. UserError if it fails to start."""
    directory = box.directory
    if supervisor_pid(directory) is not None:
        status(box)
        return
    directory.logs.mkdir(parents=True, exist_ok=True)
    directory.ready.unlink(missing_ok=True)
    with directory.log("supervisor").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "infra.box", "run"],
            cwd=ROOT,
            env={**os.environ, "SDTRAIN_STATE": str(directory.root), "SDTRAIN_PORT": str(box.port)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait(lambda: directory.ready.exists() or process.poll() is not None, _UP_S)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if not directory.ready.exists():
        process.terminate()
        process.wait()
        log = directory.log("supervisor").read_text(errors="replace").strip()
        raise UserError(
            log.partition("error: ")[2] or f"The box did not come up. {directory.log('supervisor')} says:\n{log}"
        )
    print(f"Up: {box.page}   (logs in {directory.logs})\n\n    source {directory.variables}\n")
    print("in each shell that is to use it; then, for example, prefect deployment run build-demo --watch")


def down(box: Box) -> None:
    """Ends the box and all its processes but keeps its data; UserError if it did not end."""
    directory = box.directory
    pid = supervisor_pid(directory)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        if not _wait(lambda: supervisor_pid(directory) is None, _DOWN_S):
            raise UserError(f"The box did not end within {_DOWN_S:.0f} s; {directory.log('supervisor')} says why.")
    leftover = marked(directory.root)  # of a killed supervisor
    end_processes(leftover, FAMILY_GRACE_S)
    print("Down." if pid is not None or leftover else f"The box in {directory.root} was not up.")


def status(box: Box) -> None:
    """Prints whether the box is up, and its page's address."""
    pid = supervisor_pid(box.directory)
    if pid is None:
        print(f"Down: {box.directory.root}")
    elif box.directory.ready.exists():
        print(f"It is up: {box.directory.ready.read_text().strip()}   (process {pid}, state in {box.directory.root})")
    else:
        print(f"Starting or ending: process {pid}, state in {box.directory.root}")


def deploy(box: Box) -> None:
    """Applies the current pools, automations and deployments; UserError if the box is down or refuses one."""
    if supervisor_pid(box.directory) is None or not box.directory.ready.exists():
        raise UserError(f"The box in {box.directory.root} is not up. `make up` first, which deploys as well.")
    run_bootstrap(box)
    print(f"Deployed; {box.directory.log('bootstrap')} has the details.")


def run(box: Box) -> None:
    """Runs the box in the foreground, for a service manager."""
    Supervisor(box).run()


COMMANDS: dict[str, Callable[[Box], None]] = {"up": up, "down": down, "deploy": deploy, "status": status, "run": run}


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def main() -> int:
    """Runs a command; a user error is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m infra.box", description="Runs everything on this machine.")
    parser.add_argument("command", choices=COMMANDS)
    command = COMMANDS[parser.parse_args().command]
    return exit_code_of(lambda: command(box_of_environment()))


if __name__ == "__main__":
    sys.exit(main())
