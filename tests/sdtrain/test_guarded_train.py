"""Steps whose gradient must not be applied, in real training."""

import pytest

from sdtrain.config import load_config
from sdtrain.errors import UserError
from sdtrain.formats.checkpoint import Checkpoint, find_checkpoint
from sdtrain.train import train
from sdtrain.training.optimizer import learning_rate
from sdtrain.training.run_dir import RunDir
from tests.sdtrain.launching import log_of
from tests.training_fixtures import write_config


def config_of(tmp_path, world, guard, **changes):
    basis = {"steps": 5, "checkpoint": {"every": 1, "keep_last": 9}, "guard": guard}
    return load_config(str(write_config(tmp_path / "config.yaml", *world, **basis | changes)))


@pytest.fixture
def spoil(ranks, monkeypatch):
    """Makes the gradient of one step not a number, while the loss that is shown stays as it is."""
    from sdtrain.training.state import TrainingState

    losses, step_was_applied = TrainingState.losses, TrainingState.step_was_applied

    def begin(spoiled_step):
        now = [0]

        def spoiled_losses(self, batch):
            weighted, unweighted = losses(self, batch)
            return (weighted * float("nan") if now[0] == spoiled_step else weighted), unweighted

        def count(self, step):
            now[0] = step + 1
            return step_was_applied(self, step)

        monkeypatch.setattr(TrainingState, "losses", spoiled_losses)
        monkeypatch.setattr(TrainingState, "step_was_applied", count)

    return begin


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp16"])
def test_a_skipped_step_changes_nothing_and_training_goes_on(
    tmp_path, world, ranks, spoil, capsys, monkeypatch, precision
):
    if precision == "fp16":  # CPUs can, but DeepSpeed says they should not
        monkeypatch.setattr("deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.is_fp16_supported", lambda _: True)
    config = config_of(tmp_path, world, {"on_nonfinite": "skip"}, precision=precision)
    spoil(2)
    assert train(config, RunDir(tmp_path / "run"), ranks) == 5
    before, after, later = (
        Checkpoint(tmp_path / "run" / "checkpoints" / f"step-0000000{step}").layout for step in (2, 3, 4)
    )
    assert after.files == before.files != later.files  # weights, moments and average
    assert (before.guard.num_skipped, after.guard.num_skipped, later.guard.num_skipped) == (0, 1, 1)
    assert log_of(tmp_path / "run")[2] == ""
    assert log_of(tmp_path / "run", "grad_norm")[2] == "nan"
    rates = [learning_rate(step, config.optimizer, config.schedule) for step in range(5)]
    assert log_of(tmp_path / "run", "lr") == [str(rate) for rate in rates]  # as if the step had been applied
    assert capsys.readouterr().out.count("step 2 skipped: its gradient is not finite") == 1


def test_after_a_skipped_step_a_stopped_run_goes_on_bit_for_bit(tmp_path, world, ranks, spoil):
    guard = {"on_nonfinite": "skip", "max_grad_norm_ratio": 1.05, "norm_window": 2}
    config = config_of(tmp_path, world, guard, steps=8)
    spoil(1)
    train(config, RunDir(tmp_path / "straight"), ranks)
    train(config.model_copy(update={"steps": 4}), RunDir(tmp_path / "stopped"), ranks)
    train(config, RunDir(tmp_path / "stopped"), ranks)
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "straight")
    layouts = [find_checkpoint(tmp_path / name).layout for name in ("straight", "stopped")]
    assert layouts[0] == layouts[1]
    assert layouts[0].guard.num_skipped > 1  # spikes, too


def test_where_the_policy_is_to_stop_no_checkpoint_holds_what_is_not_finite(tmp_path, world, ranks, spoil):
    spoil(2)
    for precision, sentence in (
        ("bf16", "A gradient was not finite at or shortly"),
        ("fp32", "Step 2 was not applied"),
    ):
        run_dir = RunDir(tmp_path / precision)
        with pytest.raises(UserError, match=sentence):
            train(config_of(tmp_path, world, {}, precision=precision), run_dir, ranks)
        assert find_checkpoint(run_dir.path).layout.step == 2


def test_a_bad_gradient_stops_at_the_next_line_of_the_log_and_not_only_at_the_next_checkpoint(
    tmp_path, world, ranks, spoil
):
    spoil(2)
    config = config_of(tmp_path, world, {}, checkpoint={"every": 100})
    with pytest.raises(UserError, match="A gradient was not finite at or shortly before step 3"):
        train(config, RunDir(tmp_path / "run"), ranks)
    assert not list((tmp_path / "run").glob("checkpoints/*"))
