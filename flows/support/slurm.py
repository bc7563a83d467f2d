"""Runs a SLURM job like a child process: submits it once, follows its log, cancels it with the flow run."""

import hashlib
import json
import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdtrain.dataset.files import publish
from sdtrain.errors import UserError

STATE_FILE = "slurm-job.json"
POLL_S = 2.0
GRACE_S = 20.0
"""How long a cancelled flow run waits for its job; SLURM's KillWait ends it in any case."""
_ASK_S = 60.0
_TRANSIENT = ("Unable to contact", "Socket timed out")
_TAIL_BYTES = 16_384
_STOPPED = ("CANCELLED", "DEADLINE", "PREEMPTED", "REVOKED", "TIMEOUT")
_BROKEN = ("BOOT_FAIL", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY")
_ALIVE = "PENDING,CONFIGURING,RUNNING,SUSPENDED"
"""Without COMPLETING: a cancelled job then writes its checkpoint, and the next one waits for its end."""
_OVER = frozenset(["COMPLETED", "GONE", *_STOPPED, *_BROKEN])


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A job to submit, which appends to `log`.

    `options` of sbatch override the script's `#SBATCH` lines; `folder` is the run's directory, on shared storage, used
    by one job at a time.
    """

    script: Path
    arguments: Sequence[str]
    options: Sequence[str]
    folder: Path
    log: Path

    @property
    def name(self) -> str:
        """Unique to the folder, so that a restarted flow finds the running job."""
        digest = hashlib.sha256(str(self.folder.absolute()).encode()).hexdigest()
        return f"sdtrain-{self.folder.name}-{digest[:12]}"


def run_job(
    job: Job,
    environment: dict[str, str],
    on_line: Callable[[str], None] = lambda line: None,
    on_id: Callable[[str], None] = lambda job_id: None,
) -> str:
    """Runs a job to its end and returns its final SLURM state, e.g. COMPLETED.

    A job of a killed run that already works on the folder is followed instead of submitting a second one. Cancelling
    the run or terminating this process cancels the job; after an error here, as when the controller does not answer for
    a minute, it goes on, and the next run follows it. `environment` extends this process's; `on_id` gets the job id
    before `on_line` gets any line of the log. UserError if SLURM is not installed, or rejects the job.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    log = _Log(job.log)
    job_id = active_job(job.name)
    if job_id is None:
        job_id = _submit(job, environment)
    else:
        log.read_only_the_tail()
    try:
        _record(job, job_id)
        on_id(job_id)
        while (state := state_of(job_id)) not in _OVER:
            log.pass_on(on_line)
            time.sleep(POLL_S)
    except Exception:
        raise  # the job itself is fine, and the next run follows it
    except BaseException:
        _try_to_cancel(job_id)
        raise
    log.pass_on(on_line)
    return state


def recorded_job(folder: Path) -> str | None:
    """The id of the last job submitted for a run's directory."""
    try:
        return str(json.loads((folder / STATE_FILE).read_text())["job_id"])
    except (OSError, ValueError, KeyError):
        return None


def active_job(name: str) -> str | None:
    """The id of the pending or running job of that name, if any."""
    listed = _ask("squeue", "--noheader", "--me", "--name", name, "--states", _ALIVE, "--format", "%A").split()
    return listed[0] if listed else None


def state_of(job_id: str) -> str:
    """A job's SLURM state; GONE once SLURM has forgotten an ended job."""
    try:
        shown = _ask("scontrol", "show", "job", job_id, "--oneliner")
    except UserError as error:
        if "Invalid job id" in str(error):
            return "GONE"
        raise
    found = re.search(r"JobState=(\w+)", shown)
    return found.group(1) if found else "GONE"


def cancel(job_id: str) -> None:
    """Cancels a job and waits a while, as training still writes a checkpoint."""
    _ask("scancel", job_id)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and state_of(job_id) not in _OVER:
        time.sleep(0.5)


def _try_to_cancel(job_id: str) -> None:
    """Like `cancel`, but only logs a failure, which must not hide what ended the run."""
    try:
        cancel(job_id)
    except UserError as error:
        _log.warning("Job %s may go on: %s", job_id, error)


def _submit(job: Job, environment: dict[str, str]) -> str:
    # Singleton: if two flows submit at once, the second job waits for the first.
    own = [f"--job-name={job.name}", f"--output={job.log.absolute()}", "--dependency=singleton", "--parsable"]
    output = _ask("sbatch", *job.options, *own, str(job.script), *job.arguments, environment=environment)
    return output.strip().split(";")[0]


def _record(job: Job, job_id: str) -> None:
    with publish(job.folder / STATE_FILE) as temporary:
        temporary.write_text(json.dumps({"job_id": job_id, "name": job.name}) + "\n")


def _ask(*command: str, environment: dict[str, str] | None = None) -> str:
    """The output of a SLURM command, retried for a minute while the controller does not answer."""
    # If the flow is a SLURM job, its variables would become options of the new one.
    mine = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}
    deadline = time.monotonic() + _ASK_S
    while True:
        try:
            done = subprocess.run(  # noqa: S603 (no shell, and the arguments are ours)
                command, env=mine | (environment or {}), capture_output=True, text=True, timeout=_ASK_S
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"{command[0]} did not answer for {_ASK_S:.0f} seconds. Is SLURM's controller up?"
            ) from error
        except OSError as error:
            raise UserError(
                f"{command[0]} could not be started: {error.strerror}. Launcher 'slurm' needs SLURM's commands on the "
                "machine that runs the flow."
            ) from error
        if done.returncode == 0:
            return done.stdout
        if not any(text in done.stderr for text in _TRANSIENT) or time.monotonic() > deadline:
            raise UserError(f"{command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
        time.sleep(POLL_S)


class _Log:
    """Reads a growing, possibly missing, file by line."""

    def __init__(self, path: Path):
        self._path, self._rest = path, b""
        self._offset = path.stat().st_size if path.exists() else 0

    def read_only_the_tail(self) -> None:
        """Starts shortly before the end, for a job that is found running."""
        self._offset = max(0, self._offset - _TAIL_BYTES)

    def pass_on(self, on_line: Callable[[str], None]) -> None:
        """Calls `on_line` with each new complete line."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            on_line(line.decode(errors="replace"))
