"""`python -m infra.box up`, `down`, `deploy`, `status` and `run`; SDTRAIN_STATE and SDTRAIN_PORT say where."""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from flows.support.process_tree import end_processes
from infra.box.layout import ROOT, Box, box_of_environment
from infra.box.lock import holder
from infra.box.programs import furnish
from infra.box.services import FAMILY_GRACE_S, marked
from infra.box.supervisor import Supervisor
from sdtrain.errors import UserError

_UP_S, _DOWN_S = 300.0, 180.0


def up(box: Box) -> None:
    """Starts the box in the background and returns when it is healthy; says so if it is up already.

    Raises:
        UserError: it did not come up.
    """
    place = box.place
    if holder(place) is not None:
        status(box)
        return
    place.logs.mkdir(parents=True, exist_ok=True)
    place.ready.unlink(missing_ok=True)
    with place.log("supervisor").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "infra.box", "run"],
            cwd=ROOT,
            env={**os.environ, "SDTRAIN_STATE": str(place.root), "SDTRAIN_PORT": str(box.port)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        came_up = _wait(lambda: place.ready.exists() or process.poll() is not None, _UP_S) and place.ready.exists()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if not came_up:
        process.terminate()
        process.wait()
        said = place.log("supervisor").read_text(errors="replace").strip()
        raise UserError(
            said.partition("error: ")[2] or f"The box did not come up. {place.log('supervisor')} says:\n{said}"
        )
    print(f"Up: {box.page}   (logs in {place.logs})\n\n    source {place.variables}\n")
    print("in each shell that is to use it; then, for example, prefect deployment run build-demo --watch")


def down(box: Box) -> None:
    """Ends the box and all that it started; its data stays.

    Raises:
        UserError: it did not end.
    """
    place = box.place
    pid = holder(place)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        if not _wait(lambda: holder(place) is None, _DOWN_S):
            raise UserError(f"The box did not end within {_DOWN_S:.0f} s; {place.log('supervisor')} says why.")
    leftover = marked(place.root)  # of a supervisor that was killed
    end_processes(leftover, FAMILY_GRACE_S)
    print("Down." if pid is not None or leftover else f"The box in {place.root} was not up.")


def status(box: Box) -> None:
    """Says whether the box is up, and on which page."""
    pid = holder(box.place)
    if pid is None:
        print(f"Down: {box.place.root}")
    elif box.place.ready.exists():
        print(f"It is up: {box.place.ready.read_text().strip()}   (process {pid}, state in {box.place.root})")
    else:
        print(f"Starting or ending: process {pid}, state in {box.place.root}")


def deploy(box: Box) -> None:
    """Applies pools, automations and deployments as they are now.

    Raises:
        UserError: the box is down, or a deployment was refused.
    """
    if holder(box.place) is None or not box.place.ready.exists():
        raise UserError(f"The box in {box.place.root} is not up. `make up` first, which deploys as well.")
    furnish(box)
    print(f"Deployed; {box.place.log('furnish')} has the details.")


def run(box: Box) -> None:
    """Runs the box in the foreground, for a service manager."""
    Supervisor(box).run()


COMMANDS: dict[str, Callable[[Box], None]] = {"up": up, "down": down, "deploy": deploy, "status": status, "run": run}


def _wait(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def main() -> int:
    """Exit code 0, or 2 with a sentence."""
    parser = argparse.ArgumentParser(prog="python -m infra.box", description="Runs everything on this machine.")
    parser.add_argument("command", choices=COMMANDS)
    try:
        COMMANDS[parser.parse_args().command](box_of_environment())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
