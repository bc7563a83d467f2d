"""Our optimizer step on several ranks beside plain PyTorch in one process."""

import math

import pytest
import torch

from sdtrain.training.ema import Ema
from sdtrain.training.optimizer import make_adamw, set_learning_rate
from tests.sdtrain.training.forked_ranks import on_ranks
from tests.sdtrain.training.toy_steps import ACCUMULATION, batch_of, config_of, loss_of, network, steps_of, train


def weights_after(ranks, config):
    engine, partition, ema = steps_of(ranks, config)
    set_learning_rate(engine.optimizer, 0.01)
    train(engine, 3, ranks.rank)
    inside = sum(slot.numel for slot in partition.slots) - partition.start
    same = torch.cat([p.detach().flatten() for p in engine.module.parameters()])
    return partition.master[:inside].tolist(), ema.average[:inside].tolist(), same.tolist(), engine.grad_norm()


def reference(config, num_ranks):
    """Plain PyTorch with all ranks' batches in one process."""
    module = network(2)
    adam = make_adamw(list(module.parameters()), config)
    set_learning_rate(adam, 0.01)
    average = Ema(torch.nn.utils.parameters_to_vector(module.parameters()).detach(), config.ema)
    for step in range(3):
        losses = [loss_of(module, batch_of(step, k, rank)) for k in range(ACCUMULATION) for rank in range(num_ranks)]
        (sum(losses) / len(losses)).backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), config.optimizer.max_grad_norm or math.inf)
        adam.step()
        adam.zero_grad()
        average._master.copy_(torch.nn.utils.parameters_to_vector(module.parameters()).detach())
        average.update()
    return average._master, average.average, float(norm)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    configs = {
        clip: config_of(folder, precision="fp32", optimizer={"lr": 1, "max_grad_norm": clip}) for clip in (0.0, 0.05)
    }
    jobs = {clip: (weights_after, (config,)) for clip, config in configs.items()}
    return configs, {num_ranks: on_ranks(num_ranks, jobs) for num_ranks in (1, 2, 3)}


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_apply_the_clipped_mean_and_have_one_network(answers, num_ranks, clip):
    configs, found = answers
    weights, average, norm = reference(configs[clip], num_ranks)
    assert norm > 0.05, "or nothing is clipped"
    parts = found[num_ranks][clip]
    whole = [weight for part in parts for weight in part[0]]
    torch.testing.assert_close(torch.tensor(whole), weights, rtol=1e-4, atol=1e-6)
    found_average = torch.tensor([weight for part in parts for weight in part[1]])
    torch.testing.assert_close(found_average, average, rtol=1e-4, atol=1e-6)
    assert all(part[2] == whole for part in parts)
    assert [part[3] for part in parts] == pytest.approx([norm] * num_ranks, rel=1e-5)
