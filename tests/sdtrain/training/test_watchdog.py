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


def hang_after(folder, moves, **limits):
    """What a lone rank says that hangs after `moves`, and for how long it was left alone, in seconds."""
    ended = []
    began = time.monotonic()
    with Watchdog(folder, ranks_of(0, 1), 0.2, ended.append, **limits) as watchdog:
        moves(watchdog)
        while not ended and time.monotonic() < began + 60:
            time.sleep(0.02)
    assert ended == [EXIT_CODE]
    return (folder / "stalled" / "verdict.txt").read_text(), time.monotonic() - began


def passes(*shapes):
    """Moves that stay in the last pass."""
    return lambda watchdog: [next(watchdog.follow(iter([shape]), 0, lambda shape: shape)) for shape in shapes]


def test_a_first_pass_may_compile_for_longer_and_the_message_says_so(tmp_path):
    text, waited_s = hang_after(tmp_path, passes((4, 8)), compile_timeout_s=1.5)
    assert waited_s > 1.5
    assert "no progress for 1.5 s (guard.compile_timeout_s, which holds while the network may be compiled" in text
    assert "all ranks are at the same place (a pass through the network after step 0)" in text


def test_what_was_compiled_has_the_usual_limit_again_until_another_shape_comes(tmp_path):
    for name, shapes in {"same": ((4, 8), (4, 8)), "other": ((4, 8), (4, 8), (4, 9))}.items():
        text, _ = hang_after(tmp_path / name, passes(*shapes), compile_timeout_s=1.5)
        setting = {"same": "0.2 s (guard.stall_timeout_s)", "other": "1.5 s (guard.compile_timeout_s"}[name]
        assert f"Training made no progress for {setting}" in text
    for phase, setting in {"previews": "1.5 s (guard.compile_timeout_s", "a checkpoint": "0.2 s (guard.stall"}.items():
        text, _ = hang_after(
            tmp_path / phase, lambda watchdog, phase=phase: watchdog.at(3, phase), compile_timeout_s=1.5
        )
        assert f"Training made no progress for {setting}" in text


def test_a_network_that_is_not_compiled_has_the_usual_limit_from_the_start(tmp_path):
    text, _ = hang_after(tmp_path, passes((4, 8)))
    assert "Training made no progress for 0.2 s (guard.stall_timeout_s). Behind" in text


def test_a_rank_waits_for_another_that_may_be_compiling(tmp_path, monkeypatch):
    monkeypatch.setattr("sdtrain.training.watchdog._kill_if_here", lambda beat: None)  # both are this process
    ended, other = [], Watchdog(tmp_path, ranks_of(1, 2), 0.2, compile_timeout_s=60)
    other.at(0, "a pass through the network")
    other._beat()
    with Watchdog(tmp_path, ranks_of(0, 2), 0.2, ended.append, compile_timeout_s=60) as watchdog:
        watchdog.at(0, "logging")
        time.sleep(1.2)
        assert not ended
        other.at(0, "logging")
        other._beat()
        deadline = time.monotonic() + 60
        while not ended and time.monotonic() < deadline:
            time.sleep(0.02)
    assert ended == [EXIT_CODE]


def test_training_takes_the_longer_limit_only_if_it_compiles(tmp_path):
    from sdtrain.config.sections import SpeedConfig
    from sdtrain.train import _watchdog, configure
    from sdtrain.training.run_dir import RunDir

    config = configure("tiny")
    for how, limit_s in {"off": 0.0, "regional": 3600.0}.items():
        chosen = config.model_copy(update={"speed": SpeedConfig(compile=how)})
        assert _watchdog(chosen, RunDir(tmp_path), ranks_of(0, 1))._compile_timeout_s == limit_s
