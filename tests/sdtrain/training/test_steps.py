"""Our optimizer step: what runs in it, and that its arithmetic is PyTorch's."""

import json
import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdtrain.config.sections import EmaConfig, GuardConfig
from sdtrain.training import optimizer as optimizer_module
from sdtrain.training.ema import Ema
from sdtrain.training.optimizer import PartitionUpdate, make_adamw, set_learning_rate
from tests.benchmarks.engine_traffic import BytesMoved, python_calls
from tests.sdtrain.training.toy_steps import ACCUMULATION, batch_of, config_of, loss_of, network, steps_of, train


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def without_views(counts):
    return Counter({name: number for name, number in counts.items() if name not in ("detach", "alias", "view")})


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_micro_step_runs_as_much_python_for_many_parameters_as_for_few(tmp_path, ranks, precision):
    found, bare = [], network(1, precision)
    batch = batch_of(0, 0, dtype=next(bare.parameters()).dtype)
    for depth in (1, 50):
        engine, *_ = steps_of(ranks, config_of(tmp_path, precision=precision), depth)
        for _ in range(2):  # the first of a step takes another way than those that follow
            loss = loss_of(engine, batch)
            found.append(python_calls(lambda engine=engine, loss=loss: (engine.backward(loss), engine.step())))
    assert found[:2] == found[2:]
    assert max(found) < python_calls(loss_of(bare, batch).backward) + 30


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_each_gradient_is_copied_once_or_added_once(tmp_path, ranks, precision):
    depth, counts = 5, []
    engine, *_ = steps_of(ranks, config_of(tmp_path, precision=precision), depth)
    bare = network(depth, precision)
    for backward in (bare, engine, engine):
        loss = loss_of(backward, batch_of(0, 0, dtype=next(bare.parameters()).dtype))
        with Operations() as operations:
            loss.backward() if backward is bare else (engine.backward(loss), engine.step())
        counts.append(operations.counts)
    plain, first, second = counts
    scaled = Counter(div=2, mul=2)  # of the loss and of its gradient
    assert without_views(first - plain) == Counter(_foreach_copy_=1) + scaled
    cast = Counter(_to_copy=2 * depth if precision == "bf16" else 0)
    assert without_views(second - plain) == Counter(add_=2 * depth) + scaled + cast
    kept = [parameter.grad for parameter in engine.module.parameters()]
    assert all(gradient.dtype is torch.float32 for gradient in kept)
    assert len({gradient.untyped_storage().data_ptr() for gradient in kept}) == 1, "one vector has them all"


def test_the_boundary_runs_as_many_operations_for_many_parameters_as_for_few(tmp_path, ranks):
    found = []
    for depth in (1, 50):
        engine, *_ = steps_of(ranks, config_of(tmp_path, precision="bf16"), depth)
        train(engine, 1)
        engine.backward(loss_of(engine, batch_of(1, 0, dtype=torch.bfloat16)))
        engine._num_added = ACCUMULATION - 1
        with Operations() as operations, BytesMoved() as moved:
            engine.step()
        found.append(operations.counts)
    assert found[0] == found[1]
    assert [found[0][name] for name in ("_fused_adamw_", "lerp_", "copy_", "dot")] == [1, 1, 1, 1]
    num_parameters = sum(parameter.numel() for parameter in engine.module.parameters())
    norm, adam, average, copy = 4, 4 * 4 + 3 * 4, 2 * 4 + 4, 4 + 2
    assert moved.num_bytes / num_parameters == pytest.approx(norm + adam + average + copy, abs=0.1)


@pytest.mark.parametrize("fused", [True, False])
def test_a_pass_in_chunks_is_adamw_then_the_average_then_the_copy(tmp_path, monkeypatch, fused):
    monkeypatch.setattr(optimizer_module, "_CPU_CHUNK", 64)
    size, config = 64 * 5 + 17, config_of(tmp_path, speed={"fused_adamw": fused})
    start, ema_config = torch.randn(size), EmaConfig(decay=0.9)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    network, ema, adam = torch.empty(size, dtype=torch.bfloat16), Ema(ours, ema_config), make_adamw([ours], config)
    renewed, expected, reference = (
        PartitionUpdate(adam, ours, network, ema),
        Ema(theirs, ema_config),
        make_adamw([theirs], config),
    )
    for step in range(4):
        gradient = torch.randn(size)
        for optimizer in (adam, reference):
            set_learning_rate(optimizer, 0.01 * (step + 1))
        theirs.grad = gradient * 0.5
        reference.step()
        expected.update()
        renewed.apply(gradient, 0.5)
    assert torch.equal(ours, theirs)
    assert torch.equal(ema.average, expected.average)
    assert ema.num_updates == expected.num_updates == 4
    assert torch.equal(network, theirs.detach().bfloat16())
    assert all(torch.equal(adam.state[ours][name], reference.state[theirs][name]) for name in ("exp_avg", "exp_avg_sq"))
    assert float(adam.state[ours]["step"]) == 4


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_refused_step_changes_nothing_and_the_next_begins_with_zeros(tmp_path, ranks, precision):
    config = config_of(tmp_path, precision=precision, guard=GuardConfig(on_nonfinite="skip").model_dump())
    states = []
    for spoiled in (None, 1):
        engine, partition, ema = steps_of(ranks, config)
        train(engine, 1)
        if spoiled:
            train(engine, 1, spoil=lambda step, k: math.nan if k == 1 else 1.0)
            assert not engine._guard.applied
            assert math.isnan(engine.grad_norm())
        kept = [partition.master, ema.average, *partition.moments().values(), *engine.module.parameters()]
        states.append([tensor.detach().clone() for tensor in kept] + [torch.tensor(ema.num_updates)])
        train(engine, 1)
        states[-1].append(partition.master.detach().clone())
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_fp16_gradients_are_freed_of_the_scale_they_were_computed_with(tmp_path, ranks, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    extra = tmp_path / "ds.json"
    extra.write_text(json.dumps({"fp16": {"initial_scale_power": 6, "loss_scale_window": 2}}))
    engine, partition, _ = steps_of(ranks, config_of(tmp_path, precision="fp16"), extra=extra)
    plain, other, _ = steps_of(ranks, config_of(tmp_path, precision="fp32"))
    scales = []
    for _ in range(4):
        train(engine, 1)
        train(plain, 1)
        scales.append(engine._zero.loss_scale)
        assert engine.grad_norm() == pytest.approx(plain.grad_norm(), rel=5e-3)
    assert scales[-1] > scales[0], "it grew on the way"
    moments = [part.moments()["exp_avg_sq"] for part in (partition, other)]
    torch.testing.assert_close(*moments, rtol=2e-2, atol=1e-8)


def test_a_gradient_that_went_elsewhere_is_not_lost_silently(tmp_path, ranks):
    engine, *_ = steps_of(ranks, config_of(tmp_path))
    engine.backward(loss_of(engine, batch_of(0, 0, dtype=torch.bfloat16)))
    engine.step()
    engine.module.zero_grad()  # sets them to None
    with pytest.raises(RuntimeError, match="something replaced the gradient"):
        train(engine, 1)


def test_a_parameter_without_a_gradient_keeps_nothing_of_the_step_before(tmp_path, ranks):
    engine, partition, _ = steps_of(ranks, config_of(tmp_path, precision="fp32"))
    train(engine, 1)
    before = partition.moments()["exp_avg"].clone()
    for k in range(ACCUMULATION):
        engine.backward(loss_of(engine.module[0], batch_of(1, k)))
        engine.step()
    half = partition.slots[2].offset
    torch.testing.assert_close(partition.moments()["exp_avg"][half:], 0.9 * before[half:])
    assert not torch.allclose(partition.moments()["exp_avg"][:half], 0.9 * before[:half])


def test_what_a_json_asks_of_deepspeed_is_left_to_deepspeed(tmp_path):
    from sdtrain.training.engine import needs_deepspeed_steps

    config, extra = config_of(tmp_path), tmp_path / "ds.json"
    assert not needs_deepspeed_steps(config, None)
    assert needs_deepspeed_steps(config.model_copy(update={"zero_stage": 2}), None)
    for content, needs in (({"fp16": {}, "gradient_clipping": 1.0}, False), ({"wall_clock_breakdown": True}, True)):
        extra.write_text(json.dumps(content))
        assert needs_deepspeed_steps(config, extra) is needs
