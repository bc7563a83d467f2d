import multiprocessing
import os
import signal
import socket
import sys
import time

import pytest
import torch

from sdtrain.training.distributed import Ranks
from sdtrain.training.watchdog import EXIT_CODE, Watchdog

FORK = multiprocessing.get_context("fork")  # a fresh interpreter would import torch for seconds


def hang(folder, rank, place):
    """Rank `rank` of three: it moves `place` times, then hangs."""
    sys.stderr = (folder / f"said-by-{rank}").open("w", buffering=1)
    with Watchdog(folder, ranks_of(rank, 3), 2.0) as watchdog:
        for _ in range(place):
            watchdog.at(7, f"place {place}")
        time.sleep(60)


def ranks_of(rank, world_size):
    return Ranks(rank, world_size, torch.device("cpu"), None, None)


@pytest.fixture
def three(tmp_path):
    processes = [FORK.Process(target=hang, args=(tmp_path, rank, place)) for rank, place in enumerate((4, 4, 3))]
    for process in processes:
        process.start()
    yield processes
    for process in processes:
        process.kill()
        process.join()


def end_of(processes):
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.mark.slow
def test_a_rank_that_fell_behind_is_named_once_and_all_end(tmp_path, three):
    assert end_of(three) == [EXIT_CODE] * 3
    texts = [(tmp_path / f"said-by-{rank}").read_text() for rank in range(3)]
    assert sum("Training made no progress for 2 s" in text for text in texts) == 1
    verdict = (tmp_path / "stalled" / "verdict.txt").read_text()
    assert f"(process {three[2].pid}), in place 3 after step 7. The others are further on and wait for it" in verdict
    stacks = sorted(path.name for path in (tmp_path / "stalled").glob("stack*"))
    assert stacks == [f"stack-of-rank-{rank:05d}.txt" for rank in range(3)]


@pytest.mark.slow
def test_a_stopped_process_is_named_and_ended_though_it_hears_nothing(tmp_path, three):
    deadline = time.monotonic() + 30
    while not (tmp_path / "heartbeats" / "rank-00000.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(three[0].pid, signal.SIGSTOP)
    assert end_of(three) == [-signal.SIGKILL, EXIT_CODE, EXIT_CODE]
    said = (tmp_path / "said-by-1").read_text()
    assert f"Behind: rank 0 on {socket.gethostname()} (process {three[0].pid})" in said
    assert "No sign of life" in said


def test_a_run_that_moves_is_left_alone_and_leaves_nothing(tmp_path):
    ended = []
    with Watchdog(tmp_path, ranks_of(0, 1), 0.8, ended.append) as watchdog:
        for step in range(12):
            assert list(watchdog.follow(iter("ab"), step)) == ["a", "b"]
            time.sleep(0.2)
    assert not ended
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_hangs_alone_says_where(tmp_path, capsys):
    ended = []
    with Watchdog(tmp_path, ranks_of(0, 1), 0.2, ended.append) as watchdog:
        watchdog.at(3, "a checkpoint")
        deadline = time.monotonic() + 60
        while not ended and time.monotonic() < deadline:
            time.sleep(0.02)
    assert ended == [EXIT_CODE]
    assert "all ranks are at the same place (a checkpoint after step 3)" in capsys.readouterr().err
