"""AdamW with its moments in 8 bits."""

import importlib.util

import numpy as np
import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from sdtrain.config import OptimizerConfig, ScheduleConfig, TrainConfig, load_config
from sdtrain.errors import UserError
from sdtrain.settings import parse_settings
from sdtrain.train import train
from sdtrain.training.engine import make_adamw
from sdtrain.training.optimizer import learning_rate, read_moments, restore_moments
from sdtrain.training.run_dir import RunDir
from tests.training_fixtures import write_config

pytest.importorskip("bitsandbytes")


def config_of(tmp_path, world, moments):
    changes = {"precision": "fp32", "optimizer": {"lr": 1e-3, "moments": moments}}
    return load_config(str(write_config(tmp_path / "c.yaml", *world, **changes)))


@pytest.fixture(scope="module")
def losses(world, ranks, tmp_path_factory):
    def of(moments):
        folder = tmp_path_factory.mktemp(moments)
        train(config_of(folder, world, moments), RunDir(folder), ranks)
        return [float(row["loss"]) for row in RunDir(folder).log.rows()]

    return {moments: of(moments) for moments in ("fp32", "int8")}


def test_it_learns_as_in_float32_but_for_rounding(losses):
    assert losses["int8"] != losses["fp32"]
    assert losses["int8"] == pytest.approx(losses["fp32"], rel=0.02)


def test_a_stopped_run_goes_on_bit_by_bit(losses, world, ranks, tmp_path):
    asked, run_dir = iter(range(3)), RunDir(tmp_path)
    config = config_of(tmp_path, world, "int8")
    assert train(config, run_dir, ranks, stop_requested=lambda: next(asked, None) is None) == 3
    train(config, run_dir, ranks)
    assert [float(row["loss"]) for row in run_dir.log.rows()] == losses["int8"]


@pytest.mark.parametrize("numel", [10_000, 300], ids=["codes", "so few that they stay float32"])
def test_what_was_read_is_put_back_without_loss(numel, world, tmp_path):
    def optimizer_of(parameter):
        return make_adamw([parameter], config_of(tmp_path, world, "int8"))

    first, rng = torch.nn.Parameter(torch.zeros(numel)), torch.Generator().manual_seed(0)
    optimizer = optimizer_of(first)
    for step in range(3):
        first.grad = torch.randn(numel, generator=rng) * 10.0 ** -(step + torch.arange(numel) // 256 % 6)
        first.grad[:256] = 0  # a block without any
        optimizer.step()
    second = torch.nn.Parameter(first.detach().clone())
    other = optimizer_of(second)
    restore_moments(other, second, read_moments(optimizer, first), 3)
    second.grad = first.grad = torch.randn(numel, generator=rng)
    for name, moment in read_moments(optimizer, first).items():
        assert torch.equal(moment, read_moments(other, second)[name]), name
    optimizer.step(), other.step()
    assert torch.equal(first, second)


def test_without_the_package_a_sentence_says_what_to_install(world, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sdtrain\[eight-bit\]'"):
        make_adamw([torch.nn.Parameter(torch.zeros(1))], config_of(tmp_path, world, "int8"))


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
