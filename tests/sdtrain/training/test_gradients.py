"""Which gradients reach AdamW and the guard, from micro-steps and ranks with values that bf16 cannot hold together."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdtrain.config import load_config
from sdtrain.config.sections import GuardConfig
from sdtrain.errors import UserError
from sdtrain.training.guards import StepGuard
from sdtrain.training.optimizer import set_learning_rate
from tests.sdtrain.training.forked_ranks import on_ranks
from tests.training_fixtures import write_config

ACCUMULATION = 4
SIZES = (5, 7, 3)  # so that a part of ZeRO's begins in the middle of a parameter


class Toy(torch.nn.Module):
    """The gradient of its parameters is its input, whatever they are."""

    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(size)) for size in SIZES])

    def forward(self, value):
        return sum(part.sum() for part in self.parts) * value


def value_of(rank, k):
    """Of micro-step `k`: 1, then ever smaller powers of two, of which bf16 can add but a few to 1."""
    return 2.0 ** -(5 * rank + 3 * k)


def toy_engine(ranks, config, extra=None):
    from sdtrain.precision import torch_dtype
    from sdtrain.training.ema import Ema
    from sdtrain.training.engine import deepspeed_config, needs_deepspeed_steps, start_engine
    from sdtrain.training.steps import DeepSpeedSteps, FlatSteps
    from sdtrain.training.zero_partition import ZeroPartition

    toy = Toy().to(torch_dtype(config.precision))
    engine = start_engine(toy, config, deepspeed_config(config, ACCUMULATION, sum(SIZES), extra))
    partition = ZeroPartition(engine, ranks.rank)
    kind = DeepSpeedSteps if needs_deepspeed_steps(config, extra) else FlatSteps
    return kind(engine, partition, Ema(partition.master, config.ema), StepGuard(config.guard), config), partition


class GradientsOfAdam(TorchDispatchMode):
    """Keeps what the kernel of AdamW is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._fused_adamw_.default:
            self.seen.append(torch.cat(args[1]))
        return func(*args, **(kwargs or {}))


def gradient_seen_by_adam(ranks, config):
    engine, partition = toy_engine(ranks, config)
    with GradientsOfAdam() as kernel:
        for k in range(ACCUMULATION):
            value = torch.tensor(value_of(ranks.rank, k), dtype=next(engine.module.parameters()).dtype)
            engine.backward(engine(value))
            engine.step()
    inside = max(0, min(len(partition.master), sum(SIZES) - partition.start))
    return len(kernel.seen), kernel.seen[0][:inside].tolist()


def refusal(ranks, config, extra):
    try:
        toy_engine(ranks, config, extra)
    except UserError as error:
        return str(error)
    return "nothing was refused"


def guarded(ranks, config, bad, at):
    """Three steps, in the second of which micro-step `at` (rank, number) is bad; then what the guard says."""
    (engine, partition), weights, applied = toy_engine(ranks, config), [], []
    guard = engine._guard
    for step in range(3):
        set_learning_rate(engine.optimizer, 0.125)
        for k in range(ACCUMULATION):
            value = bad if (step, ranks.rank, k) == (1, *at) else 1.0
            engine.backward(engine(torch.tensor(value, dtype=next(engine.module.parameters()).dtype)))
            engine.step()
        applied.append(guard.applied)
        weights.append(partition.master.tolist())
    try:
        guard.check(3)
        said = ""
    except UserError as error:
        said = str(error)
    return said, applied, weights[0] == weights[1], all(math.isfinite(weight) for weight in weights[2])


STAGES_AND_PRECISIONS = list(itertools.product((1, 2), ("bf16", "fp32")))
BAD = list(itertools.product((1, 2), (math.nan, math.inf, -math.inf), ((1, 0), (0, ACCUMULATION - 1))))
SKIPPED = list(itertools.product(("bf16", "fp32"), (math.nan, -math.inf)))
REFUSED = [
    (1, '{"communication_data_type": "bf16"}', "sets communication_data_type, which the training config decides"),
    (1, '{"data_types": {"grad_accum_dtype": "bf16"}}', "sets data_types, which the training config decides"),
    (2, '{"zero_optimization": {"reduce_scatter": true}}', "speed.fp32_gradients does not hold with this"),
    (1, '{"zero_optimization": {"stage": 0}}', "in the place of ZeRO-1 or 2"),
    (1, '{"zero_optimization": {"round_robin_gradients": true}}', "Remove round_robin_gradients"),
    (1, '{"torch_autocast": {"enabled": true, "dtype": "bfloat16"}, "bf16": {"enabled": false}}', "does not hold"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What every job gave on 1, 2 and 3 ranks: one process a rank for all of them."""
    folder, skip = tmp_path_factory.mktemp("configs"), GuardConfig(on_nonfinite="skip").model_dump()

    def config_of(**changes):
        return load_config(str(write_config(folder / "c.yaml", "demo", "data", **changes)))

    jobs = {
        ("seen", stage, precision): (gradient_seen_by_adam, (config_of(zero_stage=stage, precision=precision),))
        for stage, precision in STAGES_AND_PRECISIONS
    }
    for stage in (1, 2):
        config = config_of(zero_stage=stage, speed={"fp32_gradients": False})
        jobs["rounded", stage] = (gradient_seen_by_adam, (config,))
    judged = {f"bad {case}": (guarded, (config_of(zero_stage=case[0]), *case[1:])) for case in BAD}
    for precision, bad in SKIPPED:
        judged[f"skip {precision} {bad}"] = (guarded, (config_of(guard=skip, precision=precision), bad, (1, 2)))
    for number, (stage, extra, _) in enumerate(REFUSED):
        (folder / f"{number}.json").write_text(extra)
        judged["refused", number] = (refusal, (config_of(zero_stage=stage), folder / f"{number}.json"))
    return {1: on_ranks(1, jobs), 2: on_ranks(2, jobs | judged), 3: on_ranks(3, jobs)}


@pytest.mark.parametrize(("stage", "precision"), STAGES_AND_PRECISIONS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_what_bf16_cannot_represent_reaches_adam(answers, num_ranks, stage, precision):
    values = [value_of(rank, k) for rank in range(num_ranks) for k in range(ACCUMULATION)]
    exact = math.fsum(values) / len(values)
    assert float(torch.tensor(exact).bfloat16()) != pytest.approx(exact, rel=1e-6), "or the test shows nothing"
    seen = answers[num_ranks]["seen", stage, precision]
    assert [number for _, part in seen for number in part] == pytest.approx([exact] * sum(SIZES), rel=1e-7)
    assert [num_steps for num_steps, _ in seen] == [1] * num_ranks


@pytest.mark.parametrize("stage", [1, 2])
def test_without_fp32_gradients_they_are_rounded(answers, stage):
    gradient = [number for _, part in answers[2]["rounded", stage] for number in part]
    assert gradient == torch.tensor(gradient).bfloat16().tolist()


@pytest.mark.parametrize(("number", "sentence"), [(number, case[2]) for number, case in enumerate(REFUSED)])
def test_a_deepspeed_json_that_would_round_them_or_lay_them_out_otherwise_is_refused(answers, number, sentence):
    assert all(sentence in said for said in answers[2]["refused", number]), answers[2]["refused", number]


@pytest.mark.parametrize("case", BAD, ids=str)
def test_one_bad_micro_step_of_one_rank_is_seen_by_all_though_the_next_step_is_fine(answers, case):
    for said, *_ in answers[2][f"bad {case}"]:
        assert said.startswith("A gradient was not finite at or shortly before step 3")


@pytest.mark.parametrize(("precision", "bad"), SKIPPED)
def test_where_the_policy_is_to_skip_all_ranks_skip_it_and_go_on(answers, precision, bad):
    assert answers[2][f"skip {precision} {bad}"] == [("", [True, False, True], True, True)] * 2
