"""A training step queues work for the GPU and never waits for it; only the line of the log does.

A CPU shows where numbers are read from tensors, and where tensors are made from numbers, which a GPU has to be sent.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdtrain.config import load_config
from sdtrain.config.sections import GuardConfig
from sdtrain.training.optimizer import learning_rate, set_learning_rate
from sdtrain.training.run_dir import RunDir
from sdtrain.training.state import TrainingState
from sdtrain.training.steps import reads_norms
from sdtrain.training.throughput import Progress
from tests.training_fixtures import write_config

ATEN = torch.ops.aten
READS = (
    ATEN._local_scalar_dense.default,
    ATEN.is_nonzero.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN.equal.default,
    ATEN._unique2.default,
)
SENDS = (ATEN.lift_fresh.default, ATEN.lift_fresh_copy.default, ATEN.scalar_tensor.default)
OPTIONS = {
    "optimizer": {"lr": 1e-3, "max_grad_norm": 0.5},
    "diffusion": {"min_snr_gamma": 5.0, "offset_noise": 0.1},
    "speed": {"channels_last": True, "fp32_gradients": False},
}


class Waits(TorchDispatchMode):
    """Lists the operations at which the host would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads_mask = func is ATEN.index.Tensor and any(i is not None and i.dtype is torch.bool for i in args[1])
        if func in READS or func in SENDS or reads_mask:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Run:
    """The loop of sdtrain.train, without its log line."""

    def __init__(self, folder, world, ranks, **changes):
        self.config = load_config(str(write_config(folder / "c.yaml", *world, **changes)))
        run_dir = RunDir(folder / "run")
        self.state = TrainingState(self.config, run_dir, ranks)
        self.progress = Progress(run_dir, self.config, ranks, 0.0)
        self.batches = self.progress.timed(self.state.batches(0))

    def step(self, step):
        state, config = self.state, self.config
        set_learning_rate(state.engine.optimizer, learning_rate(step, config.optimizer, config.schedule))
        seen = []
        for batch in state.micro_batches(self.batches):
            weighted, unweighted = state.losses(batch)
            state.engine.backward(weighted.mean())
            state.engine.step()
            seen.append((unweighted, batch.timesteps))
        self.progress.add(seen[-state.accumulation :], state.step_was_applied(step))


@pytest.mark.parametrize("changes", [{}, OPTIONS, {"zero_stage": 2}], ids=["defaults", "options", "ZeRO-2"])
def test_no_step_waits_but_the_line_of_the_log_does(tmp_path, world, ranks, changes):
    run = Run(tmp_path, world, ranks, **changes)
    with Waits() as waits:
        for step in range(3):
            run.step(step)
    assert waits.seen == []
    with Waits() as waits:
        run.state.metrics(1e-4)
        run.progress.check(3)
    assert str(ATEN._local_scalar_dense.default) in waits.seen, "the counter counts"
    with Waits() as waits:
        torch.tensor(1.0)
    assert waits.seen, "and what is sent, too"


def test_in_fp32_a_gpu_does_not_wait_either(tmp_path, world, ranks, monkeypatch):
    monkeypatch.setattr("sdtrain.training.steps.reads_norms", lambda config, device: reads_norms(config, CUDA))
    run = Run(tmp_path, world, ranks, precision="fp32")
    with Waits() as waits:
        run.step(0)
        run.step(1)
    assert waits.seen == []


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_norms_are_read_on_request_for_the_loss_scale_and_where_it_costs_nothing(tmp_path, world):
    def read_on(device, **changes):
        return reads_norms(load_config(str(write_config(tmp_path / "c.yaml", *world, **changes))), device)

    assert [read_on(device, precision="bf16") for device in (CPU, CUDA)] == [False, False]
    assert [read_on(device, precision="fp32") for device in (CPU, CUDA)] == [True, False]
    assert [read_on(device, precision="fp16") for device in (CPU, CUDA)] == [True, True]
    skips = GuardConfig(on_nonfinite="skip").model_dump()
    assert all(read_on(CUDA, precision=precision, guard=skips) for precision in ("bf16", "fp32"))


@pytest.mark.parametrize("fused", [True, False])
def test_a_resumed_unfused_adamw_has_its_count_on_the_host(fused):
    from sdtrain.training.optimizer import restore_moments

    parameter = torch.nn.Parameter(torch.zeros(4, device="meta"))
    optimizer = torch.optim.AdamW([parameter], fused=False)
    optimizer.defaults["fused"] = fused  # which meta tensors are not made for
    restore_moments(optimizer, parameter, {name: torch.zeros(4) for name in ("exp_avg", "exp_avg_sq")}, 3)
    assert optimizer.state[parameter]["step"].device.type == ("meta" if fused else "cpu")
