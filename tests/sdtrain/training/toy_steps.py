"""A toy network under our optimizer step, and its batches."""

import torch

from sdtrain.config import load_config
from sdtrain.training.ema import Ema
from sdtrain.training.guards import StepGuard
from tests.training_fixtures import write_config

ACCUMULATION, WIDTH = 3, 8


def config_of(folder, **changes):
    return load_config(str(write_config(folder / "c.yaml", "demo", "data", **changes)))


def network(depth, precision="fp32"):
    from sdtrain.precision import torch_dtype

    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(depth))).to(torch_dtype(precision))


def steps_of(ranks, config, depth=2, extra=None):
    from sdtrain.training.engine import deepspeed_config, needs_deepspeed_steps, start_engine
    from sdtrain.training.steps import FlatSteps
    from sdtrain.training.zero_partition import ZeroPartition

    assert not needs_deepspeed_steps(config, extra)
    toy = network(depth, config.precision)
    engine = start_engine(toy, config, deepspeed_config(config, ACCUMULATION, 10**6, extra))
    partition = ZeroPartition(engine, ranks.rank)
    ema = Ema(partition.master, config.ema)
    return FlatSteps(engine, partition, ema, StepGuard(config.guard), config), partition, ema


def batch_of(step, k, rank=0, dtype=torch.float32):
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * step + 10 * k + rank)).to(dtype)


def loss_of(module, batch):
    return module(batch).float().square().mean()


def train(engine, num_steps, rank=0, spoil=lambda step, k: 1.0):
    dtype = next(engine.module.parameters()).dtype
    for step in range(num_steps):
        for k in range(ACCUMULATION):
            engine.backward(loss_of(engine, batch_of(step, k, rank, dtype)) * spoil(step, k))
            engine.step()
