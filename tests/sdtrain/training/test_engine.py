"""Precision and memory options under DeepSpeed."""

import json

import pytest
import torch

from sdtrain.config import load_config
from sdtrain.formats.checkpoint import find_checkpoint
from sdtrain.train import train
from sdtrain.training.engine import deepspeed_config
from sdtrain.training.run_dir import RunDir
from sdtrain.training.state import TrainingState
from tests.training_fixtures import write_config


def run(tmp_path, world, ranks, name, deepspeed_json=None, **changes):
    """The losses of a run."""
    config = load_config(str(write_config(tmp_path / "c.yaml", *world, **changes)))
    run_dir = RunDir(tmp_path / name)
    train(config, run_dir, ranks, deepspeed_json)
    return [float(row["loss"]) for row in run_dir.log.rows()]


def test_deepspeed_neither_waits_for_the_device_nor_skips_steps_by_itself():
    settings = deepspeed_config(load_config("sd-v1-3").model_copy(update={"precision": "bf16"}), 4, 10**9, None)
    assert settings["timers"] == {"throughput": {"enabled": False}}
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": False}
    assert settings["gradient_accumulation_steps"] == 4
    assert not settings["fp16"]["enabled"]


def test_recomputed_activations_give_the_same_losses(tmp_path, world, ranks):
    config = load_config(str(write_config(tmp_path / "c.yaml", *world)))
    unet = config.unet.model_dump() | {"gradient_checkpointing": True}
    plain = run(tmp_path, world, ranks, "plain", precision="fp32", steps=4)
    assert run(tmp_path, world, ranks, "less", precision="fp32", steps=4, unet=unet) == pytest.approx(plain, rel=1e-6)


def test_fp16_repeats_a_step_that_overflows_and_loses_none(tmp_path, world, ranks, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed allows fp16 on CPUs with instructions for it only; PyTorch's kernels work without, slowly.
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    extra = tmp_path / "ds.json"
    extra.write_text(json.dumps({"fp16": {"initial_scale_power": 32}}))
    expected = run(tmp_path, world, ranks, "fp32", precision="fp32", steps=4)
    found = run(tmp_path, world, ranks, "fp16", extra, precision="fp16", steps=4)
    assert found == pytest.approx(expected, rel=5e-3)
    layout = find_checkpoint(tmp_path / "fp16").layout
    assert layout.loss_scaler["cur_scale"] < 2**32, "it overflowed, and the scale went down"
    assert layout.guard.num_skipped == 0, "but no step was lost"
    weights = [dict(find_checkpoint(tmp_path / name).weights("master")) for name in ("fp16", "fp32")]
    apart = [(weights[0][name] - value).abs().flatten() for name, value in weights[1].items()]
    assert torch.cat(apart).mean() < 1e-4, "Adam moved each by 2.5e-3 at most"


@pytest.mark.parametrize("stage", [1, 2])
def test_many_micro_batches_are_added_up_in_float32(tmp_path, world, ranks, stage):
    changes = {"global_batch_size": 64, "micro_batch_size": 1, "zero_stage": stage}
    config = load_config(str(write_config(tmp_path / "c.yaml", *world, **changes)))
    state, seen = TrainingState(config, RunDir(tmp_path / "run"), ranks), {}
    for name, parameter in state.engine.module.named_parameters():
        parameter.register_hook(lambda gradient, name=name: seen.setdefault(name, []).append(gradient.float()))
    for batch in state.micro_batches(state.batches(0)):
        state.engine.backward(state.losses(batch)[0].mean())
        state.engine.step()
    exact = torch.cat([torch.stack(parts).sum(0).flatten() for parts in seen.values()]).norm().item()
    assert len(next(iter(seen.values()))) == 64
    assert state.grad_norm() == pytest.approx(exact, rel=1e-4), "in bf16 it is 6e-4 apart"
