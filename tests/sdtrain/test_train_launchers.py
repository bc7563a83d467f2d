"""Training as users start it: `deepspeed`, torchrun, plain Python; two ranks, real signals."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from training_fixtures import write_config, write_latents, write_models

from sdtrain.checkpoint import find_checkpoint

REPOSITORY = Path(__file__).parents[2]
SCRIPT = "sdtrain/train.py"
BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    models = write_models(folder / "models")
    data = write_latents(folder / "data", models)
    return write_config(folder / "toy.yaml", models, data, steps=24, checkpoint={"every": 3, "keep_last": 100})


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    assert finish(start(deepspeed(2), config, output))[0] == 0
    return output


def deepspeed(num_ranks):
    return [BIN / "deepspeed", "--num_gpus", str(num_ranks), "--master_port", str(free_port()), SCRIPT]


def torchrun(num_ranks):
    return [BIN / "torchrun", "--nproc-per-node", str(num_ranks), "--master-port", str(free_port()), SCRIPT]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start(launcher, config, output, *arguments):
    """Starts training in its own process group."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    command = [*map(str, launcher), "--config", str(config), "--output", str(output), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True, **pipes)


def finish(process):
    """Exit code and output; no process of the group, nor a child in a session of its own, stays."""
    children = psutil.Process(process.pid).children(recursive=True)
    try:
        output, _ = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        children += psutil.Process(process.pid).children(recursive=True)
        raise
    finally:
        for member in [*children, *group_of(process)]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    return process.returncode, output


def group_of(process):
    members = []
    for candidate in psutil.process_iter():
        try:
            if os.getpgid(candidate.pid) == process.pid:
                members.append(candidate)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return members


def wait_for_step(process, output, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (output / "checkpoints" / f"step-{step:08d}").exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate(timeout=60)[0]}")


def log_of(output, column="loss"):
    with (output / "log.csv").open() as file:
        return [row[column] for row in csv.DictReader(file)]


def test_killed_in_the_middle_two_ranks_go_on_bit_for_bit(config, undisturbed, tmp_path):
    output = tmp_path / "run"
    process = start(deepspeed(2), config, output)
    wait_for_step(process, output, 6)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    assert not (output / "DONE").exists()
    code, text = finish(start(deepspeed(2), config, output))
    assert code == 0, text
    assert "from step 0 " not in text
    assert log_of(output) == log_of(undisturbed)
    assert log_of(output, "grad_norm") == log_of(undisturbed, "grad_norm")
    assert find_checkpoint(output).layout.files == find_checkpoint(undisturbed).layout.files


def test_two_ranks_become_one_with_the_same_samples_and_close_losses(config, undisturbed, tmp_path):
    output = tmp_path / "run"
    process = start(deepspeed(2), config, output)
    wait_for_step(process, output, 6)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    code, text = finish(start([sys.executable, SCRIPT], config, output))
    assert code == 0, text
    ours, theirs = map(float, log_of(output)[-1:]), map(float, log_of(undisturbed)[-1:])
    assert list(ours) == pytest.approx(list(theirs), rel=0.02)
    for a, b in zip(log_of(output), log_of(undisturbed), strict=True):
        assert float(a) == pytest.approx(float(b), rel=0.05)


def test_sigterm_writes_a_checkpoint_and_ends_cleanly(config, undisturbed, tmp_path):
    output = tmp_path / "run"
    process = start(torchrun(2), config, output)
    wait_for_step(process, output, 3)
    ranks = [p for p in psutil.Process(process.pid).children() if SCRIPT in p.cmdline()]
    assert len(ranks) == 2
    ranks[1].terminate()  # one rank hears it, all stop
    code, text = finish(process)
    assert code == 0, text
    stopped = find_checkpoint(output).layout.step
    assert f"stopped at step {stopped}" in text
    assert not (output / "DONE").exists()
    assert len(log_of(output)) == stopped
    code, text = finish(start(deepspeed(2), config, output))
    assert code == 0, text
    assert log_of(output) == log_of(undisturbed)


def test_a_mistake_is_one_sentence_from_the_first_rank(config, tmp_path):
    code, text = finish(start(torchrun(2), config, tmp_path / "run", "--data", str(tmp_path / "nowhere")))
    assert code != 0
    assert text.count("There are no latents in") == 1
    assert 'File "' not in text.split("error: ")[0]
    code, text = finish(start([sys.executable, SCRIPT], config, tmp_path / "run", "--config", "tinny"))
    assert (code, text) == (2, "error: There is no training config 'tinny'. Did you mean 'tiny'?\n")


def test_a_finished_run_ends_at_once(config, undisturbed):
    code, text = finish(start([sys.executable, SCRIPT], config, undisturbed))
    assert (code, "is finished: 24 steps" in text) == (0, True)
