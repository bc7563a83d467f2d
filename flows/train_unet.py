"""Trains the UNet: starts the DeepSpeed job, follows its log, ends it with the run."""

import os
import re
import shlex
import socket
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.utilities.callables import get_parameter_defaults
from pydantic import Field

from flows.support import slurm
from flows.support.decorators import records_no_secrets, report_user_errors
from flows.support.process_tree import run_tree
from flows.support.progress import ProgressArtifact, Throttle
from sdtrain.config import TrainConfig, load_config
from sdtrain.errors import UserError
from sdtrain.redaction import Location
from sdtrain.train import configure
from sdtrain.training.run_dir import RunDir

REPOSITORY = Path(__file__).parents[1]
TRAIN_SCRIPT = REPOSITORY / "sdtrain" / "train.py"
SLURM_SCRIPT = REPOSITORY / "infra" / "slurm" / "train.sbatch"
LOG_INTERVAL_S = 10.0
NUM_LAST_LINES = 20
_STEP = re.compile(r"step (\d+)/\d+")

Count = Annotated[int, Field(ge=1)]
Launcher = Literal["deepspeed", "slurm"]
Start = Callable[[Path, Sequence[str], Path, Callable[[str], None]], str | None]
"""Runs a script with arguments, logging to a file and by line to a function; returns what failed, if anything."""


def _run_name() -> str:
    return Path(flow_run.parameters["config"]).stem


def _cancel_job(flow: Any, flow_run: Any, state: Any) -> None:
    given = all_parameters(flow, flow_run)
    if given["launcher"] == "slurm":
        cancel_job(_run_dir(given["config"], given["output"]).path)


def all_parameters(flow: Any, flow_run: Any) -> dict[str, Any]:
    """A run's parameters, including the flow's defaults."""
    return get_parameter_defaults(flow.fn) | flow_run.parameters


def cancel_job(folder: Path) -> None:
    """Cancels a run's SLURM job, for a flow whose process could not."""
    job_id = slurm.recorded_job(folder)
    if job_id is not None:
        slurm.cancel(job_id)


@records_no_secrets
@flow(name="train-unet", flow_run_name=_run_name, on_cancellation=[_cancel_job])
@report_user_errors
def train_unet(
    config: str = "tiny",
    data: Location = "demo-output/data",
    output: Location | None = None,
    steps: Count | None = None,
    num_gpus: Count | None = None,
    init_from: Location | None = None,
    launcher: Launcher = "deepspeed",
    hostfile: str | None = None,
    slurm_options: str = "",
    slurm_script: str = str(SLURM_SCRIPT),
) -> str:
    """`deepspeed sdtrain/train.py`, from the newest checkpoint on.

    Args:
        config: A training config's name, or a YAML file.
        data: The dataset's directory.
        output: The run's directory; by default runs/ and the config's name.
        steps: Optimizer steps of the whole run; by default the config's.
        num_gpus: GPUs to use; by default all of them. Without GPUs: CPU processes, by default one.
        init_from: Run whose weights this one starts from; by default the config's.
        launcher: deepspeed on this machine (or, with a hostfile, on several), or a job on SLURM.
        hostfile: Machines for DeepSpeed, a line each: NAME slots=GPUS. This machine must reach them by ssh (pdsh), and
            all must see everything under the same path.
        slurm_options: More options for sbatch, such as "--nodes=4 --partition=gpu".
        slurm_script: The batch script; train-deepspeed.sbatch beside the default is the same with DeepSpeed's launcher.

    Returns:
        The run's directory.
    """
    start: Start = _OnSlurm(Path(slurm_script), _words(slurm_options))
    if launcher == "deepspeed":
        start = _ByDeepSpeed(num_gpus, hostfile)
    return train(config, data, output, steps, num_gpus, init_from, start=start)


def train(
    config: str,
    data: str,
    output: str | None = None,
    steps: int | None = None,
    num_gpus: int | None = None,
    init_from: str | None = None,
    script: Path = TRAIN_SCRIPT,
    start: Start | None = None,
) -> str:
    """Trains within a flow, by default through DeepSpeed's launcher; returns the run's directory.

    UserError, with the log's last lines, if training ended early.
    """
    run_dir = _run_dir(config, output)
    last_step = steps or load_config(config).steps
    if _is_finished(run_dir, configure(config, data, steps, init_from)):
        get_run_logger().info("train: finished before, nothing to do")
        return str(run_dir.path.absolute())
    arguments = ["--config", config, "--data", data, "--output", str(run_dir.path), "--steps", str(last_step)]
    arguments += ["--init_from", init_from] if init_from else []
    log_file = run_dir.path / "console.log"
    with ProgressArtifact("train", last_step, "steps") as progress:
        lines = _LogLines(progress)
        failure = (start or _ByDeepSpeed(num_gpus))(script, arguments, log_file, lines.add)
    # The launcher returns 0 even when killed, so only the marker shows that training is done.
    reached = run_dir.finished_step()
    if failure or reached is None or reached < last_step:
        raise UserError(
            f"Training ended before step {last_step} ({failure or 'exit code 0'}). Run it again to go on from its "
            f"newest checkpoint. Last lines of {log_file}:\n" + "\n".join(lines.last)
        )
    return str(run_dir.path.absolute())


def _is_finished(run_dir: RunDir, config: TrainConfig) -> bool:
    """Whether nothing is left to train; checked here too, as the launcher takes 15 s to find out."""
    run_dir.check_config(config)
    done = run_dir.finished_step()
    return done is not None and done >= config.steps


@dataclass(frozen=True)
class _ByDeepSpeed:
    """Starts training on this machine or, with a hostfile, on several."""

    num_gpus: int | None
    hostfile: str | None = None

    def __call__(self, script: Path, arguments: Sequence[str], log: Path, on_line: Callable[[str], None]) -> str | None:
        launcher = _launcher_on_hosts(Path(self.hostfile), self.num_gpus) if self.hostfile else _launcher(self.num_gpus)
        code = run_tree([*launcher, script, *arguments], log, on_line, _environment())
        return f"exit code {code}" if code else None


@dataclass(frozen=True)
class _OnSlurm:
    """Starts training as a SLURM job, whose batch script names the training script."""

    batch: Path
    options: Sequence[str]

    def __call__(self, script: Path, arguments: Sequence[str], log: Path, on_line: Callable[[str], None]) -> str | None:
        job = slurm.Job(self.batch, arguments, self.options, log.parent, log)
        places = {"SDTRAIN_HOME": str(REPOSITORY), "SDTRAIN_BIN": str(Path(sys.executable).parent)}
        ended = slurm.run_job(job, places, on_line, lambda job_id: _tell_job(job, job_id))
        return None if ended in ("COMPLETED", "GONE") else f"SLURM: {ended}"


def _tell_job(job: slurm.Job, job_id: str) -> None:
    get_run_logger().info("SLURM job %s (%s); its log is %s", job_id, job.name, job.log)
    try:
        create_markdown_artifact(f"SLURM job **{job_id}** (`{job.name}`), log `{job.log}`", key="slurm-job")
    except (httpx.HTTPError, PrefectException) as error:
        get_run_logger().debug("The artifact of the job was not written: %s", error)


class _LogLines:
    """Forwards throttled lines, and remembers the last ones."""

    def __init__(self, progress: ProgressArtifact):
        self.last: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self._progress, self._throttle, self._logger = progress, Throttle(LOG_INTERVAL_S), get_run_logger()

    def add(self, line: str) -> None:
        self.last.append(line)
        if match := _STEP.search(line):
            self._progress.show(int(match.group(1)))
        if self._throttle.ready():
            self._logger.info("%s", line)


def _launcher(num_gpus: int | None) -> list[str | Path]:
    """DeepSpeed's launcher; without a number it takes all GPUs, or those in CUDA_VISIBLE_DEVICES."""
    launcher: list[str | Path] = [Path(sys.executable).with_name("deepspeed"), "--master_port", str(_free_port())]
    if num_gpus is None and _has_gpu():
        return launcher
    return [*launcher, "--num_gpus", str(num_gpus or 1)]


def _launcher_on_hosts(hostfile: Path, num_gpus: int | None) -> list[str | Path]:
    hosts = _hosts_of(hostfile)
    launcher: list[str | Path] = [Path(sys.executable).with_name("deepspeed"), "--hostfile", hostfile.absolute()]
    launcher += ["--master_addr", hosts[0], "--master_port", str(_free_port())]
    return [*launcher, "--num_gpus", str(num_gpus)] if num_gpus else launcher


def _hosts_of(hostfile: Path) -> list[str]:
    if not hostfile.is_file():
        raise UserError(f"There is no hostfile {hostfile}.")  # DeepSpeed would train on this machine alone
    hosts = []
    for number, line in enumerate(hostfile.read_text().splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not (match := re.fullmatch(r"(\S+)\s+slots=[1-9]\d*\s*", line.strip())):
            raise UserError(f"Line {number} of {hostfile} is {line.strip()!r}; write NAME slots=GPUS.")
        hosts.append(match.group(1))
    if not hosts:
        raise UserError(f"{hostfile} names no host. Write a line for each: NAME slots=GPUS.")
    return hosts


def _words(options: str) -> list[str]:
    try:
        return shlex.split(options)
    except ValueError as error:
        raise UserError(f"slurm_options {options!r} cannot be read: {error}.") from error


def _run_dir(config: str, output: str | None) -> RunDir:
    return RunDir(Path(output or Path("runs") / load_config(config).name))


def _environment() -> dict[str, str]:
    return {} if _has_gpu() or "DS_ACCELERATOR" in os.environ else {"DS_ACCELERATOR": "cpu"}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
