"""Trains the UNet: starts the DeepSpeed job, follows its log, ends it with the run."""

import os
import re
import socket
import sys
from collections import deque
from pathlib import Path
from typing import Annotated

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from pydantic import Field

from flows.failure import fails_with_a_sentence
from flows.launch import run_tree
from flows.progress import ProgressArtifact, Throttle
from sdtrain.config import TrainConfig, load_config
from sdtrain.errors import UserError
from sdtrain.run_dir import RunDir
from sdtrain.train import configure

TRAIN_SCRIPT = Path(__file__).parents[1] / "sdtrain" / "train.py"
LOG_INTERVAL_S = 10.0
NUM_LAST_LINES = 20
_STEP = re.compile(r"step (\d+)/\d+")

Count = Annotated[int, Field(ge=1)]


def _run_name() -> str:
    return Path(flow_run.parameters["config"]).stem


@flow(name="train-unet", flow_run_name=_run_name)
@fails_with_a_sentence
def train_unet(
    config: str = "tiny",
    data: str = "demo-output/data",
    output: str | None = None,
    steps: Count | None = None,
    num_gpus: Count | None = None,
    init_from: str | None = None,
) -> str:
    """`deepspeed sdtrain/train.py`, from the newest checkpoint on.

    Args:
        config: A training config's name, or a YAML file.
        data: The dataset's directory.
        output: The run's directory; by default runs/ and the config's name.
        steps: Optimizer steps of the whole run; by default the config's.
        num_gpus: GPUs to use; by default all of them. Without GPUs: CPU processes, by default one.
        init_from: Run whose weights this one starts from; by default the config's.

    Returns:
        The run's directory.
    """
    return train(config, data, output, steps, num_gpus, init_from)


def train(
    config: str,
    data: str,
    output: str | None = None,
    steps: int | None = None,
    num_gpus: int | None = None,
    init_from: str | None = None,
    script: Path = TRAIN_SCRIPT,
) -> str:
    """The training run, in a flow. Returns the run's directory.

    Raises:
        UserError: training did not reach its last step; the message ends with the last lines of its log.
    """
    settings = load_config(config)
    run_dir = RunDir(Path(output or Path("runs") / settings.name))
    last_step = steps or settings.steps
    if _is_finished(run_dir, configure(config, data, steps, init_from)):
        get_run_logger().info("train: finished before, nothing to do")
        return str(run_dir.path.absolute())
    arguments = ["--config", config, "--data", data, "--output", str(run_dir.path), "--steps", str(last_step)]
    arguments += ["--init_from", init_from] if init_from else []
    log_file = run_dir.path / "console.log"
    with ProgressArtifact("train", last_step, "steps") as progress:
        lines = _LogLines(progress)
        code = run_tree([*_launcher(num_gpus), script, *arguments], log_file, lines.add, _environment())
    # The launcher returns 0 even when it was killed, so only the marker says that training is done.
    reached = run_dir.finished_step()
    if code != 0 or reached is None or reached < last_step:
        raise UserError(
            f"Training ended before step {last_step} (exit code {code}). Run it again to go on from its newest "
            f"checkpoint. Last lines of {log_file}:\n" + "\n".join(lines.last)
        )
    return str(run_dir.path.absolute())


def _is_finished(run_dir: RunDir, config: TrainConfig) -> bool:
    """Whether nothing is to train; asked here too, because the launcher takes a quarter of a minute to say so."""
    run_dir.check_config(config)
    done = run_dir.finished_step()
    return done is not None and done >= config.steps


class _LogLines:
    """Passes on a line now and then, and remembers the last ones."""

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


def _environment() -> dict[str, str]:
    return {} if _has_gpu() or "DS_ACCELERATOR" in os.environ else {"DS_ACCELERATOR": "cpu"}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
