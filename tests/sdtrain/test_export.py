from pathlib import Path

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from training_fixtures import write_run

from sdtrain.config import DiffusionConfig, load_config
from sdtrain.errors import UserError
from sdtrain.export import export_diffusers, load_unet, write_pipeline
from sdtrain.model import build_unet
from sdtrain.samplers import sampling_scheduler


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run whose raw weights are a fresh UNet's and whose average is those plus one."""
    return write_run(tmp_path_factory.mktemp("world"), ema_offset=1.0)


def test_weights_come_by_name_raw_and_averaged(run_dir):
    raw = load_unet(run_dir, "raw")[0].state_dict()
    ema = load_unet(run_dir / "checkpoints" / "step-00000005")[0].state_dict()
    assert raw["conv_in.weight"].shape == (16, 4, 3, 3)
    assert all(torch.equal(raw[name] + 1, ema[name]) for name in raw)


@pytest.mark.parametrize("ema", [True, False])
def test_exported_folder_is_a_pipeline_that_generates(run_dir, tmp_path, ema):
    folder = export_diffusers(run_dir, tmp_path / "out", ema=ema)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    exported = pipeline.unet.state_dict()
    weights = load_unet(run_dir, "ema" if ema else "raw")[0].state_dict()
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)
    assert isinstance(pipeline.scheduler, PNDMScheduler)
    assert pipeline.safety_checker is None
    pipeline.set_progress_bar_config(disable=True)
    if not ema:
        picture = pipeline("a red circle", num_inference_steps=2).images[0]
        assert picture.size == (64, 64)


def test_scheduler_is_the_one_of_published_sd_v1():
    config = sampling_scheduler(DiffusionConfig()).config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (config.skip_prk_steps, config.set_alpha_to_one, config.steps_offset) == (True, False, 1)
    assert (config.num_train_timesteps, config.prediction_type) == (1000, "epsilon")


def test_an_export_replaces_an_export_and_nothing_else(run_dir, tmp_path):
    output = export_diffusers(run_dir, tmp_path / "out")
    (output / "stale").touch()
    export_diffusers(run_dir, output)
    assert not (output / "stale").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    precious = tmp_path / "precious"
    precious.mkdir()
    with pytest.raises(UserError, match="not an earlier export"):
        export_diffusers(run_dir, precious)


def test_a_failed_export_leaves_the_old_one(run_dir, tmp_path, monkeypatch):
    output = export_diffusers(run_dir, tmp_path / "out")
    before = sorted(p.name for p in output.iterdir())
    config = load_config(str(run_dir / "config.yaml"))

    def fail(self, folder):
        Path(folder).mkdir()
        raise OSError("gone")

    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", fail)
    with pytest.raises(OSError, match="gone"):
        write_pipeline(build_unet(config.unet, 8), config, output)
    assert sorted(p.name for p in output.iterdir()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
