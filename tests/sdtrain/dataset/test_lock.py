"""One command at a time changes a dataset; who reads it keeps it as it is; whoever ends lets go."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdtrain import cli
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.lock import lock_to_change, lock_to_read
from sdtrain.errors import UserError

# Takes a dataset, forks a child that lives on (its number is the answer), and waits to be killed.
HOLDER = """
import os, sys, time
from pathlib import Path
from sdtrain.dataset import lock as dataset_lock
from sdtrain.dataset.layout import DatasetDir

lock = getattr(dataset_lock, sys.argv[1])(DatasetDir(Path(sys.argv[2])), sys.argv[3])
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(100)
"""


@pytest.fixture
def dataset(tmp_path):
    dataset = DatasetDir(tmp_path / "data")
    dataset.root.mkdir()
    dataset.recipe.write_text("name: test\nselect: {metadata: x}\n")
    return dataset


@pytest.fixture
def hold(dataset):
    """Starts a process that holds the dataset; returns its number. They end with the test, and their children too."""
    started = []

    def start(kind: str, command: str) -> int:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
        arguments = [sys.executable, "-c", HOLDER, kind, str(dataset.root), command]
        started.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment))
        children.append(int(started[-1].stdout.readline()))
        return started[-1].pid

    children: list[int] = []
    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()
    for child in children:
        os.kill(child, signal.SIGKILL)


def test_the_second_to_change_it_is_told_who_is_at_work(dataset, hold):
    pid = hold("lock_to_change", "sdtrain build")
    with pytest.raises(UserError) as error:
        lock_to_change(dataset, "sdtrain remove")
    found = str(error.value)
    assert f"sdtrain build is running (process {pid} on {socket.gethostname()}, since 20" in found
    assert found.startswith(f"{dataset.root} is in use: ")
    assert found.endswith("Wait for the end, and run sdtrain remove again.")
    with pytest.raises(UserError, match="sdtrain build is running"):
        lock_to_read(dataset, "training")


def test_readers_stand_beside_each_other_and_nobody_changes_it_meanwhile(dataset, hold):
    pid = hold("lock_to_read", "training")
    with lock_to_read(dataset, "sdtrain report"), pytest.raises(UserError) as error:
        lock_to_change(dataset, "sdtrain build")
    assert f"training is running (process {pid} " in str(error.value)
    assert f"sdtrain report is running (process {os.getpid()} " in str(error.value)


@pytest.mark.parametrize("kind", ["lock_to_change", "lock_to_read"])
def test_a_killed_process_lets_go_though_its_child_lives_on(dataset, hold, kind):
    pid = hold(kind, "sdtrain build")
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while True:
        try:
            lock = lock_to_change(dataset, "sdtrain build")
            break
        except UserError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with lock, pytest.raises(UserError) as error:
        lock_to_read(dataset, "training")
    assert f"process {pid} " not in str(error.value), "the sentence names one that has ended"
    with lock_to_read(dataset, "training"):
        pass


def test_a_forgotten_lock_is_none(dataset):
    lock = lock_to_read(dataset, "training")
    del lock
    lock_to_change(dataset, "sdtrain build").close()


def test_what_cannot_be_written_can_be_read(dataset, monkeypatch):
    opened = Path.open

    def open_to_read(path, mode="r", **more):
        if mode != "r":
            raise PermissionError(13, "Permission denied")
        return opened(path, mode, **more)

    monkeypatch.setattr(Path, "open", open_to_read)
    lock_to_read(dataset, "training").close()
    with pytest.raises(UserError, match=r"cannot be written .*Choose another --output"):
        lock_to_change(dataset, "sdtrain build")


def test_where_a_removal_was_interrupted_nobody_reads(dataset):
    dataset.removal.write_text("{}")
    with pytest.raises(UserError, match="Run the same `sdtrain remove` or `sdtrain build` first"):
        lock_to_read(dataset, "training")
    lock_to_change(dataset, "sdtrain build").close()


@pytest.mark.parametrize(
    "arguments",
    [("decide", "--min-side", "2"), ("remove", "--list", "none.txt"), ("report",), ("build", "--metadata", "x")],
)
def test_every_command_that_changes_it_asks(dataset, monkeypatch, capsys, arguments):
    command, *options = arguments
    place = ["demo", "--output", str(dataset.root)] if command == "build" else [str(dataset.root)]
    monkeypatch.setattr(sys, "argv", ["sdtrain", command, *place, *options])
    with lock_to_change(dataset, "another"), pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert f"error: {dataset.root} is in use: another is running" in capsys.readouterr().err
