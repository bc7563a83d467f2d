"""Training as users start it: `deepspeed`, torchrun, plain Python; two ranks, real signals."""

import os
import random
import signal
import socket
import sys
import time

import psutil
import pytest
import yaml

from sdtrain.config import load_config
from sdtrain.formats.checkpoint import find_checkpoint
from sdtrain.training.optimizer import learning_rate
from sdtrain.training.run_dir import RunDir
from tests.sdtrain.launching import BIN, SCRIPT, deepspeed, finish, log_of, start, torchrun, wait_for_step
from tests.training_fixtures import write_config, write_latents, write_models

WATCHED = "tests/sdtrain/watched_train.py"
KILLS = int(os.environ.get("SDTRAIN_KILLS", "1"))  # `make test-kills` asks for 20
STEPS = 12 * max(2, KILLS)  # a run that 20 kills do not outlive
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 120 * KILLS)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    models = write_models(folder / "models")
    data = write_latents(folder / "data", models)
    guard = {"on_nonfinite": "skip", "max_grad_norm_ratio": 1.07, "norm_window": 3, "max_skips_in_a_row": 1000}
    checkpoint = {"every": 2, "keep_last": 100}
    return write_config(folder / "toy.yaml", models, data, steps=STEPS, checkpoint=checkpoint, guard=guard)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    code, text = finish(start(deepspeed(2), config, output))
    assert code == 0, text
    assert " skipped: its gradient's norm is " in text  # what decides about that must come back after a kill too
    return output


def test_on_two_ranks_the_rate_counts_optimizer_steps_and_every_rank_saves(config, undisturbed):
    settings = load_config(str(config))
    expected = [learning_rate(step, settings.optimizer, settings.schedule) for step in range(STEPS)]
    assert [float(rate) for rate in log_of(undisturbed, "lr")] == expected
    assert len(find_checkpoint(undisturbed).layout.files) == 2


def test_killed_at_any_moment_two_ranks_go_on_bit_for_bit(config, undisturbed, tmp_path):
    rng, output, torn = random.Random(KILLS), tmp_path / "run", []
    for number in range(KILLS):
        process = start(deepspeed(2, WATCHED), config, output, SLOW_DISK_S="0.3")
        torn.append(kill_at_random(process, output, rng, in_a_write=number % 2 == 0))
        assert not (output / "DONE").exists()
    code, text = finish(start(deepspeed(2), config, output))
    assert code == 0, text
    assert "from step 0 " not in text
    assert any(torn), "no kill hit the writing of a checkpoint"
    assert log_of(output) == log_of(undisturbed)
    assert log_of(output, "grad_norm") == log_of(undisturbed, "grad_norm")
    assert find_checkpoint(output).layout.files == find_checkpoint(undisturbed).layout.files
    assert not list((output / "checkpoints").glob(".*"))


def kill_at_random(process, output, rng, in_a_write):
    """Kills all once a new checkpoint is there: while the next is written, or some time later.

    Says whether the kill tore one.
    """
    folder = output / "checkpoints"
    before, deadline = len(list(folder.glob("step-*"))), time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if len(list(folder.glob("step-*"))) > before and (not in_a_write or list(folder.glob(".step-*.partial/.*"))):
            break
        time.sleep(0.002)
    if not in_a_write:
        time.sleep(rng.uniform(0, 0.6))
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    return bool(list(folder.glob(".step-*.partial")))


def test_sigterm_writes_a_checkpoint_and_ends_cleanly_however_often_it_comes(config, undisturbed, tmp_path):
    output = tmp_path / "run"
    process = start(torchrun(2), config, output)
    wait_for_step(process, output, 4)
    ranks = [p for p in psutil.Process(process.pid).children() if SCRIPT in p.cmdline()]
    assert len(ranks) == 2
    for _ in range(3):  # one rank hears it, all stop
        ranks[1].terminate()
        time.sleep(0.05)
    code, text = finish(process)
    assert code == 0, text
    stopped = find_checkpoint(output).layout.step
    assert f"stopped at step {stopped}" in text
    assert not (output / "DONE").exists()
    assert len(log_of(output)) == stopped
    assert log_of(output) == log_of(undisturbed)[:stopped]
    assert sorted(p.name for p in output.iterdir() if p.name in ("heartbeats", "stalled")) == []


@pytest.mark.long
def test_a_stopped_rank_is_named_and_the_job_ends(config, tmp_path):
    impatient, output = tmp_path / "impatient.yaml", tmp_path / "run"
    content = yaml.safe_load(config.read_text()) | {"guard": {"stall_timeout_s": 10}, "steps": 100_000}
    impatient.write_text(yaml.safe_dump(content))
    process = start(deepspeed(2), impatient, output)
    wait_for_step(process, output, 2)
    ranks = {p.environ()["RANK"]: p for p in psutil.Process(process.pid).children(recursive=True) if is_rank(p)}
    victim = ranks["1"]
    victim.suspend()
    code, text = finish(process)
    assert code != 0
    assert text.count("Training made no progress for 10 s") == 1
    assert f"(process {victim.pid})" in text
    assert "No sign of life" in text
    assert not any(p.is_running() for p in ranks.values())
    assert find_checkpoint(output).layout.step >= 2


def is_rank(process):
    return SCRIPT in process.cmdline() and "RANK" in process.environ()


def test_a_mistake_is_one_sentence_from_the_first_rank(config, tmp_path):
    code, text = finish(start(torchrun(2), config, tmp_path / "run", "--data", str(tmp_path / "nowhere")))
    assert code != 0
    assert text.count("There are no latents in") == 1
    assert 'File "' not in text.split("error: ")[0]
    code, text = finish(start([sys.executable, SCRIPT], config, tmp_path / "run", "--config", "tinny"))
    assert (code, text) == (2, "error: There is no training config 'tinny'. Did you mean 'tiny'?\n")


def test_a_finished_run_ends_at_once(config, undisturbed):
    code, text = finish(start([sys.executable, SCRIPT], config, undisturbed))
    assert (code, f"is finished: {STEPS} steps" in text) == (0, True)


def test_a_port_and_a_run_directory_that_another_job_has_are_told_in_a_sentence(config, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launcher = [BIN / "deepspeed", "--num_gpus", "2", "--master_port", str(port), SCRIPT]
        code, text = finish(start(launcher, config, tmp_path / "run"))
    assert code != 0
    assert f"error: Port {port} of this machine is in use" in text
    assert "deepspeed --master_port" in text
    assert "Traceback" not in text
    with RunDir(tmp_path / "run").lock():
        code, text = finish(start(deepspeed(2), config, tmp_path / "run"))
    assert code != 0
    assert f"error: {tmp_path / 'run'} is in use: training is running (process {os.getpid()} on " in text
    assert "Traceback" not in text
