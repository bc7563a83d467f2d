"""Rungs of the ladder share a process, so each must give its memory back: SD v1's state takes 22 GB of a GPU."""

import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch

from sdtrain.training.state import TrainingState
from tests.benchmarks.ladder import FIRST, free_memory
from tests.benchmarks.training_loops import Clock, time_training
from tests.benchmarks.training_world import endless, settings_of, write_settings, write_world
from tests.gpu_check.training import WATCHED_STATE, alone


@pytest.mark.slow
def test_a_rung_leaves_neither_networks_nor_optimizer_behind(tmp_path: Path) -> None:
    kept: list[weakref.ref[object]] = []

    class Followed(TrainingState):
        def __init__(self, *arguments: object):
            super().__init__(*arguments)
            tensors: list[torch.Tensor] = [self.partition.master, self.ema.average]
            kept.extend(map(weakref.ref, [self, self.engine, self.engine.module, self.engine.optimizer, *tensors]))

    content = write_world(tmp_path, endless(settings_of("tiny", 64), 10**6) | {"micro_batch_size": 2})
    content |= {"previews": {"every": 0}, "validation": {"num_samples": 0}}
    config = write_settings(tmp_path / "c.yaml", FIRST.content(content, 4))
    with alone() as ranks, mock.patch(WATCHED_STATE, Followed):
        measured = time_training(config, tmp_path / "run", ranks, Clock(1, 0.1))
    free_memory()
    assert measured["images_per_s"] > 0
    assert [type(alive()).__name__ for alive in kept if alive() is not None] == []
    assert len(kept) == 6
