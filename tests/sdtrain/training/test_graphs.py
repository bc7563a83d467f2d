"""A CUDA graph leaves its results in memory that its next replay overwrites. Gradients do not stay there."""

import pytest
import torch

from sdtrain.config import load_config
from sdtrain.errors import UserError
from sdtrain.training.engine import deepspeed_config
from sdtrain.training.run_dir import RunDir
from sdtrain.training.state import TrainingState
from tests.training_fixtures import write_config

GRAPHS = {"compile": "whole", "compile_mode": "reduce-overhead"}


def weights_after(folder, world, ranks, replays, **changes):
    """The master weights after two optimizer steps of two micro-batches each."""
    config = load_config(str(write_config(folder / "c.yaml", *world, schedule={"warmup_steps": 0}, **changes)))
    state = TrainingState(config, RunDir(folder / "run"), ranks)
    memory = {}

    def in_the_graphs_memory(name):
        def hook(gradient):
            # Later micro-batches' gradients have been cast to the dtype that they are added up in.
            return memory.setdefault((name, gradient.dtype), torch.empty_like(gradient)).copy_(gradient)

        return hook

    if replays:
        for name, parameter in state.engine.module.named_parameters():
            parameter.register_hook(in_the_graphs_memory(name))
    batches = state.batches(0)
    for _ in range(2):
        for batch in state.micro_batches(batches):
            state.engine.backward(state.losses(batch)[0].mean())
            for buffer in memory.values():
                buffer.fill_(float("nan"))  # as the next forward pass may
            state.engine.step()
    batches.close()
    return state.partition.master.detach().clone()


@pytest.mark.parametrize(
    "changes",
    [{"precision": "fp32"}, {"precision": "bf16"}, {"precision": "bf16", "speed": {"fp32_gradients": False}}],
    ids=str,
)
def test_gradients_are_added_up_elsewhere_in_every_precision(tmp_path, world, ranks, changes):
    plain, replayed = (weights_after(tmp_path, world, ranks, replays, **changes) for replays in (False, True))
    assert torch.equal(plain, replayed)
    assert replayed.isfinite().all()


def test_deepspeeds_own_steps_are_refused_with_graphs(tmp_path, world):
    def made(extra=None, **changes):
        config = load_config(str(write_config(tmp_path / "c.yaml", *world, **changes)))
        return deepspeed_config(config, 2, 1000, extra)

    made(speed=GRAPHS)
    made(zero_stage=2)
    with pytest.raises(UserError, match=r"reduce-overhead replays CUDA graphs.*Set zero_stage to 1"):
        made(speed=GRAPHS, zero_stage=2)
    extra = tmp_path / "ds.json"
    extra.write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}')
    made(extra)
    with pytest.raises(UserError, match="or set compile_mode to default"):
        made(extra, speed=GRAPHS)
