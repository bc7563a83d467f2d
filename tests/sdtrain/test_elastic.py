"""One run, whatever number of ranks and whatever ZeRO stage does its steps."""

import json
import os

import pytest
import torch

from sdtrain.config import load_config
from sdtrain.formats.checkpoint import find_checkpoint
from sdtrain.train import train
from sdtrain.training.distributed import join
from sdtrain.training.run_dir import RunDir
from tests.sdtrain.launching import finish, launch, log_of, start, torchrun
from tests.sdtrain.plain_training import train_plainly
from tests.training_fixtures import write_config, write_latents, write_models

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
WATCHED = "tests/sdtrain/watched_train.py"
STEPS, FIRST, SECOND = 12, 4, 8
SPOILED = 2
"""The step in which rank 1 of 2 gets a gradient that is not a number."""
ACCUMULATION = {1: 8, 2: 4, 4: 2}


class Legs:
    """A run whose first steps two ranks did, the next four ranks under ZeRO-2, and the last one rank."""

    def __init__(self, folder):
        self.folder, models = folder, write_models(folder / "models")
        self._world = models, write_latents(folder / "data", models)
        self.output = folder / "run"
        self.texts = {2: self._launch(2, FIRST, SPOIL=f"{SPOILED}:1"), 4: self._launch(4, SECOND, zero_stage=2)}
        self.averages = dict(find_checkpoint(self.output / "checkpoints" / f"step-{FIRST:08d}").weights("ema"))
        self.texts[1] = self._launch(1, STEPS)

    def config_file(self, **changes):
        basis = {
            "precision": "fp32",
            "micro_batch_size": 1,
            "steps": STEPS,
            "optimizer": {"lr": 1e-3, "max_grad_norm": 0.5},
            "checkpoint": {"every": 100, "keep_last": 9},
            "guard": {"on_nonfinite": "skip"},
        }
        return write_config(self.folder / "config.yaml", *self._world, **basis | changes)

    def _launch(self, num_ranks, steps, **changes):
        environment = {"WATCH_TO": str(self.folder / f"watched-{num_ranks}")}
        if "SPOIL" in changes:
            environment["SPOIL"] = changes.pop("SPOIL")
        (self.folder / f"watched-{num_ranks}").mkdir()
        config = self.config_file(**changes)
        code, text = finish(
            start(torchrun(num_ranks, WATCHED), config, self.output, "--steps", str(steps), **environment)
        )
        assert code == 0, text
        return text

    def lines(self, num_ranks):
        """What the ranks wrote down, one list for each."""
        files = sorted((self.folder / f"watched-{num_ranks}").iterdir())
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]

    def samples(self, num_ranks):
        """Step -> digests of all samples that went into the network, in no order."""
        seen = {}
        for line in (line for lines in self.lines(num_ranks) for line in lines if "samples" in line):
            seen.setdefault(line["step"], []).extend(line["samples"])
        return {step: sorted(digests) for step, digests in seen.items()}


@pytest.fixture(scope="module")
def legs(tmp_path_factory):
    return Legs(tmp_path_factory.mktemp("legs"))


@pytest.fixture(scope="module")
def alone(legs):
    """Losses and averages of plain PyTorch in this process, and of the engine."""
    before = dict(os.environ)
    torch.set_num_threads(1)
    ranks = join(None)
    config = load_config(str(legs.config_file()))
    try:
        yield train_plainly(config, SPOILED), config, ranks
    finally:
        ranks.close()
        os.environ.clear()
        os.environ.update(before)


def test_every_step_has_the_same_samples_noise_timesteps_and_drops(legs, alone):
    _, config, _ = alone
    expected = samples_of_one_process(config)
    seen = {step: digests for num_ranks in (2, 4, 1) for step, digests in legs.samples(num_ranks).items()}
    assert seen == expected
    assert [sorted(legs.samples(n)) for n in (2, 4, 1)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def samples_of_one_process(config):
    from sdtrain.formats.frozen import load_text_encoder
    from sdtrain.loading.loader import BatchMaker
    from sdtrain.loading.sources import open_samples
    from tests.sdtrain.watched_train import digest

    tokenizer, _ = load_text_encoder(config.text_encoder)
    maker = BatchMaker(open_samples(config, 0.35), tokenizer, config, 0, 1)
    batches = {step: [maker.make(step, k) for k in range(maker.accumulation)] for step in range(config.steps)}
    return {s: sorted(digest(b, i) for b in made for i in range(len(b.timesteps))) for s, made in batches.items()}


def test_losses_are_those_of_one_process(legs, alone):
    expected = alone[0][0]
    losses = log_of(legs.output)
    assert losses[SPOILED] == ""  # nothing was learned from it
    for step in set(range(STEPS)) - {SPOILED}:
        assert float(losses[step]) == pytest.approx(expected[step], rel=2e-5), step


def test_all_ranks_skip_the_step_that_one_of_them_spoiled(legs):
    applied = [[line["applied"] for line in lines if "applied" in line] for lines in legs.lines(2)]
    assert applied == [[step != SPOILED for step in range(FIRST)]] * 2
    assert legs.texts[2].count(f"warning: step {SPOILED} skipped: its gradient is not finite (1 skipped so far)") == 1
    assert find_checkpoint(legs.output).layout.guard.num_skipped == 1


def test_two_ranks_equal_distributed_data_parallel_and_their_average(legs):
    output, config = legs.folder / "plain.pt", legs.config_file(steps=FIRST)
    command = [*torchrun(2, "tests/sdtrain/plain_training.py"), config, output, str(SPOILED)]
    code, text = finish(launch(command))
    assert code == 0, text
    plain = torch.load(output, weights_only=True)
    losses = log_of(legs.output)
    for step in (0, 1, 3):
        assert float(losses[step]) == pytest.approx(plain["losses"][step], rel=1e-5)
    for name, value in plain["ema"].items():
        torch.testing.assert_close(legs.averages[name], value, rtol=1e-4, atol=1e-6)


def test_gradients_are_reduced_once_in_a_step_and_under_zero_2_once_in_a_micro_step(legs):
    numel = sum(value.numel() for value in legs.averages.values())
    for num_ranks, times in ((2, 1), (4, ACCUMULATION[4])):
        for line in (line for lines in legs.lines(num_ranks) for line in lines if "reduced" in line):
            total = sum(line["reduced"].values())
            assert times * numel <= total < times * numel + 1000, (num_ranks, line)


def test_the_stage_can_change_in_the_middle_and_nothing_else_does(legs, alone, tmp_path):
    _, config, ranks = alone
    stages = {1: config, 2: config.model_copy(update={"zero_stage": 2})}
    for name, order in (("straight", (1, 1, 1)), ("changed", (1, 2, 1))):
        for stage, steps in zip(order, (FIRST, SECOND, STEPS), strict=True):
            train(stages[stage].model_copy(update={"steps": steps}), RunDir(tmp_path / name), ranks)
    assert log_of(tmp_path / "changed") == log_of(tmp_path / "straight")
    files = [find_checkpoint(tmp_path / name).layout.files for name in ("straight", "changed")]
    assert files[0] == files[1]
