"""Training as jobs of a real SLURM: submitted once, cancelled with the flow, stopped and requeued without loss."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.support.slurm import STATE_FILE, active_job, recorded_job, state_of
from sdtrain.formats.checkpoint import find_checkpoint
from tests.hosts.slurm_fixtures import why_not
from tests.sdtrain.launching import BIN, REPOSITORY, deepspeed, finish, log_of, start
from tests.training_fixtures import write_config, write_latents, write_models

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("slurm_cluster"),
    pytest.mark.skipif(why_not() is not None, reason=f"needs SLURM: {why_not()}"),
]

BATCHES = REPOSITORY / "infra" / "slurm"
STEPS = 150  # seconds of work
ON_CPUS = ["--gpus-per-node=0", "--cpus-per-task=2", "--time=30"]

# The launcher of the flow, without Prefect's server.
FLOW = """
import json, sys
from pathlib import Path
from flows.support.slurm import Job, run_job
batch, folder, options, arguments = json.loads(sys.argv[1])
print(run_job(
    Job(Path(batch), arguments, options, Path(folder), Path(folder) / "console.log"),
    {"SDTRAIN_HOME": sys.argv[2], "SDTRAIN_BIN": sys.argv[3], "SDTRAIN_RANKS_PER_NODE": "2"},
    print, lambda job_id: print("job", job_id, flush=True),
))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    models = write_models(folder / "models")
    data = write_latents(folder / "data", models)
    return write_config(folder / "toy.yaml", models, data, steps=1000, checkpoint={"every": 5, "keep_last": 3})


class Flow:
    """A flow's process that trains by a job."""

    def __init__(self, batch: str, config: Path, folder: Path, steps: int, options: list[str] = ON_CPUS):
        arguments = ["--config", str(config), "--output", str(folder), "--steps", str(steps)]
        given = json.dumps([str(BATCHES / batch), str(folder), options, arguments])
        command = [sys.executable, "-c", FLOW, given, str(REPOSITORY), str(BIN)]
        self.folder = folder
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    @property
    def job(self) -> str:
        wait_until(lambda: recorded_job(self.folder), self)
        return str(recorded_job(self.folder))

    def end(self) -> str:
        said, _ = self.process.communicate(timeout=300)
        return said


def wait_until(holds: Callable[[], object], flow: Flow, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, said_by(flow)
        time.sleep(0.1)


def said_by(flow: Flow) -> str:
    log = flow.folder / "console.log"
    return log.read_text() if log.exists() else "no log"


def steps_of(folder: Path) -> int:
    return len(log_of(folder)) if (folder / "log.csv").exists() else 0


@pytest.mark.parametrize("batch", ["train.sbatch", "train-deepspeed.sbatch"])
def test_near_its_time_limit_a_job_is_requeued_and_loses_nothing(batch: str, config: Path, tmp_path: Path) -> None:
    flow = Flow(batch, config, tmp_path / "run", STEPS)
    job = flow.job
    wait_until(lambda: steps_of(flow.folder) >= 10, flow)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)  # what SLURM sends near the limit
    wait_until(lambda: "goes back into the queue" in said_by(flow), flow)
    stopped = find_checkpoint(flow.folder).layout.step
    assert 10 <= stopped < STEPS
    said = flow.end()
    assert said.splitlines()[-1] == "COMPLETED", said
    assert f"from step {stopped} " in said
    assert recorded_job(flow.folder) == job
    undisturbed = tmp_path / "undisturbed"
    code, text = finish(start(deepspeed(2), config, undisturbed, "--steps", str(STEPS)))
    assert code == 0, text
    assert log_of(flow.folder) == log_of(undisturbed)


def test_a_cancelled_flow_cancels_its_job_which_ends_with_a_checkpoint(config: Path, tmp_path: Path) -> None:
    flow = Flow("train.sbatch", config, tmp_path / "run", 100_000)
    job = flow.job
    wait_until(lambda: steps_of(flow.folder) >= 7, flow)
    flow.process.send_signal(signal.SIGINT)
    said = flow.end()
    assert "KeyboardInterrupt" in said
    assert state_of(job) == "CANCELLED"
    assert find_checkpoint(flow.folder).layout.step == steps_of(flow.folder)


def test_a_flow_that_was_killed_finds_its_job_and_submits_no_second(config: Path, tmp_path: Path) -> None:
    killed = Flow("train.sbatch", config, tmp_path / "run", STEPS)
    job = killed.job
    wait_until(lambda: steps_of(killed.folder) >= 3, killed)
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.end()
    assert active_job(json.loads((killed.folder / STATE_FILE).read_text())["name"]) == job
    flow = Flow("train.sbatch", config, tmp_path / "run", STEPS)
    said = flow.end().splitlines()
    assert said[0] == f"job {job}"
    assert said[-1] == "COMPLETED"
    assert any(f"step {STEPS}/{STEPS}" in line for line in said)
