"""AdamW with its moments in 8 bits."""

import importlib.util

import pytest
import torch

from sdtrain.config import load_config
from sdtrain.errors import UserError
from sdtrain.train import train
from sdtrain.training.engine import make_adamw
from sdtrain.training.optimizer import read_moments, restore_moments
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
