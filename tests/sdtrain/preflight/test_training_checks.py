import shutil
import sys
from collections import namedtuple

import pytest

from sdtrain import cli
from sdtrain.config import load_config
from sdtrain.errors import UserError
from sdtrain.preflight.checks import findings
from sdtrain.preflight.training import late_checks, training_checks
from sdtrain.train import train
from sdtrain.training.run_dir import RunDir
from tests.training_fixtures import write_config, write_run

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def toy(tmp_path, world):
    """Makes a toy config with changes."""

    def make(**changes):
        return load_config(str(write_config(tmp_path / "c.yaml", *world, **changes)))

    return make


def problems(config, tmp_path):
    found = findings(training_checks(config, tmp_path / "run"))
    return {finding.name: finding.text for finding in found if finding.is_problem}


def test_a_run_that_lacks_nothing_passes(toy, tmp_path):
    assert problems(toy(), tmp_path) == {}


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"vae": "/nowhere/vae"}, "vae", "/nowhere"),
        ({"text_encoder": "/nowhere/clip"}, "text_encoder", "/nowhere"),
        ({"data": {"root": "/nowhere/data", "resolution": 64}}, "data", "no latents"),
        ({"init_from": "/nowhere/run"}, "init_from", "/nowhere/run"),
        ({"validation": {"num_samples": 50}}, "data", "leaves nothing to train on"),
    ],
)
def test_what_a_run_will_need_is_opened(toy, tmp_path, changes, name, words):
    found = problems(toy(**changes), tmp_path)
    assert words in found[name]


def test_a_text_encoder_of_another_width_is_found(toy, tmp_path):
    unet = toy().unet.model_copy(update={"cross_attention_dim": 32})
    found = problems(toy().model_copy(update={"unet": unet}), tmp_path)
    assert "cross_attention_dim is 32" in found["text_encoder"]


def test_a_model_to_start_from_must_have_the_same_unet(toy, tmp_path):
    run = write_run(tmp_path / "before", 0.0)
    assert "init_from" not in problems(toy(init_from=str(run)), tmp_path)
    unet = toy().unet.model_copy(update={"block_out_channels": (32, 64)})
    found = problems(toy(init_from=str(run)).model_copy(update={"unet": unet}), tmp_path)
    assert "(16, 32)" in found["init_from"]


def test_checkpoints_that_cannot_fit_on_the_disk_are_said_at_the_start(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, 1000))
    assert "more checkpoints will take about" in problems(toy(), tmp_path)["checkpoint"]


def test_training_checks_before_its_first_step_what_it_opens_only_later(toy, tmp_path, ranks, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, 1000))
    with pytest.raises(UserError, match="more checkpoints will take about"):
        train(toy(), RunDir(tmp_path / "run"), ranks)
    assert not (tmp_path / "run" / "log.csv").exists()
    assert [check.name for check in late_checks(toy(), tmp_path)] == ["output", "checkpoint", "tracking"]


def test_the_vae_that_previews_need_hours_later_is_among_them(toy, tmp_path):
    config = toy(previews={"every": 5, "prompts": ["a red circle"]})
    vae = tmp_path / "vae"
    shutil.copytree(config.vae, vae)
    file = next(vae.rglob("diffusion_pytorch_model.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    (found, *_) = findings(late_checks(config.model_copy(update={"vae": str(vae)}), tmp_path))
    assert (found.name, found.is_problem) == ("vae", True)


@pytest.mark.parametrize(("num_steps", "is_problem"), [(999, False), (1000, True)])
def test_previews_take_as_many_steps_as_their_sampler_can(toy, tmp_path, num_steps, is_problem):
    config = toy(previews={"every": 5, "prompts": ["a red circle"], "num_steps": num_steps})
    (*_, found) = findings(late_checks(config, tmp_path))
    assert (found.name, found.is_problem) == ("previews", is_problem)
    assert "take 1 to 999" in found.text or not is_problem


@pytest.mark.parametrize("broken", [False, True])
def test_the_command_tells_recipes_from_configs_and_fails_with_code_2(
    toy, tmp_path, world, monkeypatch, capsys, broken
):
    config = write_config(tmp_path / "c.yaml", *world, **({"vae": "/nowhere"} if broken else {}))
    monkeypatch.setattr(sys, "argv", ["sdtrain", "check", str(config), "--output", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == (2 if broken else 0)
    said = capsys.readouterr()
    assert "ok      text_encoder" in said.out
    assert ("PROBLEM vae" in said.out) == broken


@pytest.mark.parametrize(
    ("content", "words"),
    [("steps: [", "cannot be read as YAML"), ("name: x", "neither a recipe nor"), (None, "cannot be read")],
)
def test_a_file_that_is_neither_is_said_to_be(tmp_path, monkeypatch, capsys, content, words):
    file = tmp_path / "x.yaml"
    if content is not None:
        file.write_text(content)
    monkeypatch.setattr(sys, "argv", ["sdtrain", "check", str(file)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
