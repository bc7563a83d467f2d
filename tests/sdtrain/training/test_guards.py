import math

import pytest
import torch

from sdtrain.config import TrainConfig
from sdtrain.config.sections import GuardConfig
from sdtrain.errors import UserError
from sdtrain.formats.checkpoint import GuardState
from sdtrain.settings import parse_settings
from sdtrain.training.guards import StepGuard

NAN = math.nan


def judge(guard, norms, first_step=0):
    """What is said about each step; empty where it was applied."""
    said = []
    for step, norm in enumerate(norms, first_step):
        assert guard.may_apply(norm) == guard.applied
        said.append(guard.after_step(step))
    return said


def test_gradients_that_are_not_finite_are_skipped_and_counted():
    guard = StepGuard(GuardConfig(on_nonfinite="skip"))
    said = judge(guard, [1.0, NAN, -1.0, math.inf, 2.0])
    assert [bool(text) for text in said] == [False, True, True, True, False]
    assert said[1] == "step 1 skipped: its gradient is not finite (1 skipped so far)"
    assert guard.state == GuardState(num_skipped=3)
    assert guard.norm == 2.0


def test_too_many_in_a_row_stop():
    guard = StepGuard(GuardConfig(on_nonfinite="skip", max_skips_in_a_row=3))
    judge(guard, [NAN, NAN, 1.0, NAN, NAN])
    with pytest.raises(UserError, match=r"Step 5 was not applied: its gradient is not finite\. .* after 3 such steps"):
        judge(guard, [NAN], 5)


def test_stopping_is_the_default():
    with pytest.raises(UserError, match="Step 0 was not applied"):
        judge(StepGuard(GuardConfig()), [NAN])


def test_a_spike_is_measured_by_the_median_of_applied_steps():
    guard = StepGuard(GuardConfig(max_grad_norm_ratio=3, norm_window=4))
    norms = [90.0, 1.0, 2.0, 3.0, 12.0, 7.6, 7.4, 7.4]
    # medians of the last four applied: 2.5 (limit 7.5) after step 3; 12 and 7.6 are skipped and do not move it
    said = judge(guard, norms)
    assert [step for step, text in enumerate(said) if text] == [4, 5]
    assert "its gradient's norm is 12, more than 3 times 2.5, the median of the last 4" in said[4]
    assert guard.state == GuardState(num_skipped=2, recent_norms=(2.0, 3.0, 7.4, 7.4))


def test_a_resumed_guard_decides_alike():
    norms = [1.0, 1.1, 5.0, 1.2, NAN, 6.0, 1.0, 1.3]
    config = GuardConfig(on_nonfinite="skip", max_grad_norm_ratio=2, norm_window=2)
    straight, first = StepGuard(config), StepGuard(config)
    expected = judge(straight, norms)
    said = judge(first, norms[:5])
    second = StepGuard(config)
    second.state = GuardState.model_validate_json(first.state.model_dump_json())
    assert said + judge(second, norms[5:], 5) == expected
    assert second.state == straight.state


def test_a_spike_stops_where_the_policy_says_so():
    guard = StepGuard(GuardConfig(max_grad_norm_ratio=2, norm_window=2, on_spike="stop"))
    with pytest.raises(UserError, match="norm is 5, more than 2 times 1, the median of the last 2"):
        judge(guard, [1.0, 1.0, 5.0])


def test_what_a_loss_scaler_can_put_right_is_repeated_and_not_counted():
    guard = StepGuard(GuardConfig())
    assert not guard.may_apply(NAN, can_rescale=True)
    assert guard.must_repeat
    assert guard.state == GuardState()
    assert guard.may_apply(1.0, can_rescale=True)
    assert not guard.must_repeat


def test_norms_that_nobody_waits_for_are_looked_at_before_a_checkpoint():
    guard = StepGuard(GuardConfig())
    guard.check(0)
    for norm in (1.0, 2.0):
        guard.note(torch.tensor(norm))
    guard.check(2)
    for norm in (1.0, -1.0, 2.0):
        guard.note(torch.tensor(norm))
    with pytest.raises(UserError, match="A gradient was not finite at or shortly before step 5"):
        guard.check(5)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, NAN, -1.0, -0.5], ids=str)
@pytest.mark.parametrize("place", range(4))
def test_no_norm_that_is_not_finite_is_hidden_by_the_ones_before_and_after(bad, place):
    guard, norms = StepGuard(GuardConfig()), [0.0, 1e30, 0.5]
    norms.insert(place, bad)
    for norm in norms:
        guard.note(torch.tensor(norm))
    for _ in range(2):  # nor forgotten
        with pytest.raises(UserError, match="A gradient was not finite"):
            guard.check(4)


@pytest.mark.parametrize(("stage", "why"), [(0, "there is no stage 0"), (3, "stage 3 is not supported: it cuts up")])
def test_zero_stages_that_do_not_pay_are_refused_with_the_reason(stage, why):
    with pytest.raises(UserError, match=why):
        parse_settings(TrainConfig, {"name": "x", "steps": 1, "zero_stage": stage}, "c.yaml")
