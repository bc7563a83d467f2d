"""One training a run directory, and a port for each."""

import multiprocessing
import os
import re
import signal
import socket

import pytest

from sdtrain.errors import UserError
from sdtrain.train import parse_arguments, run
from sdtrain.training.distributed import join
from sdtrain.training.run_dir import RunDir
from tests.sdtrain.launching import free_port
from tests.training_fixtures import write_config

FORK = multiprocessing.get_context("fork")


def hold(path, ready):
    lock = RunDir(path).lock()
    ready.put(os.getpid())
    signal.pause()
    lock.close()


@pytest.fixture
def holder(tmp_path):
    """Another process that trains in a run directory."""
    ready = FORK.Queue()
    process = FORK.Process(target=hold, args=(tmp_path / "run", ready))
    process.start()
    assert ready.get(timeout=30) == process.pid
    yield process
    process.kill()
    process.join(10)


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path, holder):
    host = re.escape(socket.gethostname())
    with pytest.raises(UserError, match=rf"run is in use: training is running \(process {holder.pid} on {host}, since"):
        RunDir(tmp_path / "run").lock()


def test_the_lock_goes_with_a_killed_process(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(30)
    with RunDir(tmp_path / "run").lock():
        pass


def test_the_command_refuses_before_it_joins_anything(tmp_path, world, holder, monkeypatch):
    monkeypatch.setattr("sdtrain.training.distributed.join", lambda *_: pytest.fail("the ranks were joined"))
    config = write_config(tmp_path / "c.yaml", *world)
    with pytest.raises(UserError, match=r"run is in use: training is running"):
        run(parse_arguments(["--config", str(config), "--output", str(tmp_path / "run")]))


def test_the_command_holds_the_lock_while_it_trains_and_not_longer(tmp_path, world, monkeypatch):
    config, output = write_config(tmp_path / "c.yaml", *world), tmp_path / "run"

    def train_beside_another(*_):
        with pytest.raises(UserError, match="in use"):
            RunDir(output).lock()

    class Ranks:
        def close(self):
            pass

    monkeypatch.setattr("sdtrain.training.distributed.join", lambda *_: Ranks())
    monkeypatch.setattr("sdtrain.train.train", train_beside_another)
    arguments = parse_arguments(["--config", str(config), "--output", str(output)])
    run(arguments)
    RunDir(output).lock().close()
    monkeypatch.setenv("RANK", "1")  # another rank of the same run does not ask
    with RunDir(output).lock():
        monkeypatch.setattr("sdtrain.train.train", lambda *_: None)
        run(arguments)


@pytest.fixture
def environment():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_a_port_that_another_job_has_is_told_in_a_sentence(environment, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1", "RANK": 0, "WORLD_SIZE": 1}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=rf"^Port {port} of this machine is in use.* deepspeed --master_port \d+ "):
            join(None)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    join(None).close()  # nothing is left of the first try


def test_a_first_rank_that_is_not_there_is_told_in_a_sentence(environment, monkeypatch):
    from datetime import timedelta

    monkeypatch.setattr("sdtrain.training.distributed._TIMEOUT", timedelta(seconds=1))
    for name, value in {"MASTER_PORT": free_port(), "MASTER_ADDR": "127.0.0.1", "RANK": 1, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=r"Rank 1 cannot reach the first rank at 127\.0\.0\.1:\d+\. Check --mas"):
        join(None)
