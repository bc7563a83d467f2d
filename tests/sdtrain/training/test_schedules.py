import numpy as np
import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from sdtrain.config import OptimizerConfig, ScheduleConfig, TrainConfig
from sdtrain.errors import UserError
from sdtrain.settings import parse_settings
from sdtrain.training.schedules import learning_rate

OPTIMIZER = OptimizerConfig(lr=1e-4)


def test_the_rate_rises_linearly_and_stays():
    schedule = ScheduleConfig(warmup_steps=10_000)
    rates = [learning_rate(step, OPTIMIZER, schedule) for step in (0, 5_000, 10_000, 10**7)]
    np.testing.assert_allclose(rates, [1e-10, 0.5e-4, 1e-4, 1e-4], rtol=1e-5)
    assert learning_rate(0, OptimizerConfig(lr=0.1), ScheduleConfig(warmup_steps=0)) == 0.1


@pytest.mark.parametrize(
    ("decay", "make"), [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]
)
def test_falling_rates_agree_with_diffusers(decay, make):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    theirs = make(optimizer, num_warmup_steps=20, num_training_steps=100)
    schedule = ScheduleConfig(warmup_steps=20, decay=decay, decay_steps=100)
    for step in range(101):
        assert learning_rate(step, OPTIMIZER, schedule) == pytest.approx(theirs.get_last_lr()[0], rel=1e-4, abs=2e-10)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_a_falling_rate_ends_at_its_minimum_and_stays_there(decay):
    schedule = ScheduleConfig(warmup_steps=10, decay=decay, decay_steps=110, min_lr=2e-5)
    assert learning_rate(10, OPTIMIZER, schedule) == 1e-4
    assert learning_rate(60, OPTIMIZER, schedule) == pytest.approx(6e-5)
    assert [learning_rate(step, OPTIMIZER, schedule) for step in (110, 111, 10**6)] == pytest.approx([2e-5] * 3)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"schedule": {"decay": "cosine"}}, "cosine decay needs decay_steps, more than the 10000"),
        ({"schedule": {"decay": "linear", "warmup_steps": 5, "decay_steps": 5}}, "more than the 5 of the warm-up"),
        ({"schedule": {"min_lr": 1e-6}}, "have no effect on a constant rate"),
        (
            {"schedule": {"decay": "linear", "decay_steps": 20_000, "min_lr": 1e-3}},
            r"schedule.min_lr 0.001 is above optimizer.lr 0.0001",
        ),
    ],
)
def test_schedules_that_cannot_be_meant_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_settings(TrainConfig, {"name": "mine", "steps": 9} | settings, "mine.yaml")
