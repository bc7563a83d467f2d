import json
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open

from sdtrain.config import load_config
from sdtrain.config.sections import EmaConfig
from sdtrain.errors import UserError
from sdtrain.formats.any_model import open_model
from sdtrain.formats.checkpoint import find_checkpoint, finished, snapshots_of
from sdtrain.formats.export import ExportSettings, export_model
from sdtrain.formats.post_hoc import Profile, combination, decay_of, gamma_of, reconstruct
from sdtrain.train import train
from sdtrain.training.ema import Ema
from sdtrain.training.run_dir import RunDir
from tests.training_fixtures import write_config


def weights_of(length, num_updates):
    """How much each of the weights 1..t counts in the average: the integral of its profile over one step."""
    edges = (np.arange(num_updates + 1) / num_updates) ** (gamma_of(length) + 1)
    return np.diff(edges)


def average_of(trajectory, length, num_updates):
    return weights_of(length, num_updates) @ trajectory[:num_updates]


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_are_those_of_the_paper(length, gamma):
    assert gamma_of(length) == pytest.approx(gamma, abs=0.005)  # section 3.1 names 16.97 and 6.94


@pytest.mark.parametrize("length", [0.005, 0.03, 0.08, 0.15, 0.25, 0.28])
def test_a_length_is_the_standard_deviation_of_its_profile(length):
    times, weights = (np.arange(200_000) + 0.5) / 200_000, weights_of(length, 200_000)
    mean = weights @ times
    assert math.sqrt(weights @ (times - mean) ** 2) == pytest.approx(length, rel=1e-4)


def test_the_update_gives_the_closed_form():
    torch.manual_seed(0)
    trajectory = torch.randn(400, 5, dtype=torch.float64).cumsum(0)
    weights = torch.nn.Parameter(torch.full((5,), 1e6, dtype=torch.float64))  # before the first update: forgotten
    ema = Ema(weights, EmaConfig(post_hoc=(0.05, 0.2)))
    for number, now in enumerate(trajectory, start=1):
        with torch.no_grad():
            weights.copy_(now)
        ema.update()
        if number in (1, 2, 100, 400):
            for length, average in ema.post_hoc.items():
                expected = average_of(trajectory.numpy(), length, number)
                np.testing.assert_allclose(average.numpy(), expected, rtol=1e-9, atol=1e-9)
    assert decay_of(1, gamma_of(0.05)) == 0


def trajectories(num_updates):
    """Weights over time in closed form: straight, bent, settling down, swinging, and a random walk."""
    times = np.arange(1, num_updates + 1) / num_updates
    walk = np.random.default_rng(0).normal(size=num_updates).cumsum() / math.sqrt(num_updates)
    return np.stack([times, times**3, np.exp(-5 * times), np.sin(40 * times), walk], axis=1)


@pytest.mark.parametrize("wanted", [0.03, 0.05, 0.07, 0.08, 0.1, 0.12, 0.15])
def test_any_length_is_made_of_two_that_were_stored_often(wanted):
    num_updates, every = 20_000, 500
    trajectory = trajectories(num_updates)
    stored = [Profile(length, t) for t in range(every, num_updates + 1, every) for length in (0.05, 0.1)]
    snapshots = np.stack([average_of(trajectory, profile.length, profile.num_updates) for profile in stored])
    coefficients, error = combination(stored, Profile(wanted, num_updates))
    assert error < 0.02
    assert coefficients.sum() == pytest.approx(1, abs=0.01)
    np.testing.assert_allclose(
        coefficients @ snapshots, average_of(trajectory, wanted, num_updates), rtol=0.01, atol=0.01
    )


def test_the_error_is_that_of_the_profiles():
    stored, wanted = [Profile(0.05, 900), Profile(0.1, 1000)], Profile(0.15, 1000)
    coefficients, error = combination(stored, wanted)
    sampled = [np.pad(weights_of(p.length, p.num_updates * 100), (0, (1000 - p.num_updates) * 100)) for p in stored]
    goal = weights_of(0.15, 100_000)
    difference = coefficients @ np.stack(sampled) - goal
    assert error == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(goal), rel=1e-3)
    best = np.linalg.lstsq(np.stack(sampled, axis=1), goal, rcond=None)[0]
    np.testing.assert_allclose(coefficients, best, rtol=1e-3)


def test_a_stored_average_is_itself():
    stored = [Profile(0.05, 10), Profile(0.1, 10), Profile(0.05, 1_000_000), Profile(0.1, 1_000_000)]
    coefficients, error = combination(stored, stored[3])
    np.testing.assert_allclose(coefficients, [0, 0, 0, 1], atol=1e-6)
    assert error < 1e-6


def config_of(folder, world, **changes):
    models, latents = world
    changes = {"ema": {"decay": 0.9, "post_hoc": [0.05, 0.15], "snapshots": "fp32"}, "precision": "fp32"} | changes
    return load_config(str(write_config(folder / "run.yaml", models, latents, **changes)))


def test_a_run_stores_the_averages_of_its_weights_and_goes_on_with_them(tmp_path, world, ranks):
    from sdtrain.training.state import TrainingState

    seen, count = [], Ema.count_update

    def noted(self):
        seen.append(self._master.detach().clone())
        count(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ema, "count_update", noted)
        train(config_of(tmp_path, world, steps=8), RunDir(tmp_path / "whole"), ranks)
    trajectory = torch.stack(seen).double().numpy()
    assert [path.name for path in finished(snapshots_of(tmp_path / "whole"))] == [
        f"step-{step:08d}" for step in (8, 6, 3)
    ]
    for path in finished(snapshots_of(tmp_path / "whole")):
        layout = json.loads((path / "layout.json").read_text())
        with safe_open(path / next(iter(layout["files"])), "pt") as file:
            assert sorted(file.keys()) == ["ema_0.05", "ema_0.15"]
            for length in (0.05, 0.15):
                expected = average_of(trajectory, length, layout["step"])
                np.testing.assert_allclose(file.get_tensor(f"ema_{length}").numpy(), expected, rtol=1e-5, atol=1e-6)
    train(config_of(tmp_path, world, steps=5), RunDir(tmp_path / "parts"), ranks)
    train(config_of(tmp_path, world, steps=8), RunDir(tmp_path / "parts"), ranks)
    for which in ("ema_0.05", "ema_0.15", "ema"):
        whole, parts = (dict(find_checkpoint(tmp_path / name).weights(which)) for name in ("whole", "parts"))
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
    longer = config_of(tmp_path, world, ema={"decay": 0.9, "post_hoc": [0.2]})
    state = TrainingState(longer, RunDir(tmp_path / "parts"), ranks)
    with pytest.raises(UserError, match=r"trained 8 steps without that of length 0.2"):
        state.checkpoints.restore()


def test_snapshots_of_steps_that_are_trained_again_are_forgotten(tmp_path, world, ranks):
    train(config_of(tmp_path, world, steps=6), RunDir(tmp_path / "run"), ranks)
    damaged = find_checkpoint(tmp_path / "run").path
    (damaged / "layout.json").unlink()
    train(config_of(tmp_path, world, steps=5, checkpoint={"every": 4}), RunDir(tmp_path / "run"), ranks)
    assert [path.name for path in finished(snapshots_of(tmp_path / "run"))] == [
        f"step-{step:08d}" for step in (5, 4, 3)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory, world, ranks):
    folder = tmp_path_factory.mktemp("post-hoc")
    ema = {"decay": 0.9, "post_hoc": [0.05, 0.1]}
    config = config_of(folder, world, steps=40, ema=ema, checkpoint={"every": 2, "keep_last": 2})
    train(config, RunDir(folder / "run"), ranks)
    return folder / "run"


def test_an_export_of_a_stored_length_is_the_stored_average(run, tmp_path):
    export_model(run, tmp_path / "model.safetensors", ExportSettings(ema_length=0.1))
    found = open_model(tmp_path / "model.safetensors", "demo").state("ema")
    stored = dict(find_checkpoint(run).weights("ema_0.1"))  # fp32; the snapshots are of fp16
    for name, tensor in stored.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-3, atol=1e-4)
    assert len(finished(snapshots_of(run))) == 20
    assert len(finished(run / "checkpoints")) == 2


def test_an_export_between_the_stored_lengths_lies_between_them(run, tmp_path):
    found = reconstruct(run, 0.07)
    assert found.error < 0.02
    weights = dict(found.weights())
    short, long = (dict(find_checkpoint(run).weights(f"ema_{length}")) for length in (0.05, 0.1))
    apart = sum(float((short[name] - long[name]).square().sum()) for name in short) ** 0.5
    for other in (short, long):
        away = sum(float((weights[name] - other[name]).square().sum()) for name in weights) ** 0.5
        assert 0.1 * apart < away < 0.9 * apart


def test_what_cannot_be_made_is_a_sentence(run, tmp_path, world, ranks):
    with pytest.raises(UserError, match=r"give no average of length 0.005: the profile would be \d+% off"):
        reconstruct(run, 0.005)
    with pytest.raises(UserError, match=r"above 0 and at most 0.28, not 0.3"):
        reconstruct(run, 0.3)
    with pytest.raises(UserError, match="says nothing about raw weights"):
        export_model(run, tmp_path / "raw", ExportSettings(weights="raw", ema_length=0.1))
    train(config_of(tmp_path, world, ema={"decay": 0.9}, steps=1), RunDir(tmp_path / "plain"), ranks)
    assert not snapshots_of(tmp_path / "plain").exists()
    with pytest.raises(UserError, match="stored no averages"):
        export_model(tmp_path / "plain", tmp_path / "x", ExportSettings(ema_length=0.1))
    for wrong in ([0.3], [0.05, 0.05], [0]):
        with pytest.raises((UserError, ValidationError), match="post_hoc"):
            config_of(tmp_path, world, ema={"post_hoc": wrong})
