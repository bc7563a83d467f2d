import errno
import json
from pathlib import Path

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

from sdtrain.cli import app
from sdtrain.config import DiffusionConfig, load_config
from sdtrain.errors import UserError
from sdtrain.formats.any_model import open_model
from sdtrain.formats.export import ExportSettings, export_model, write_pipeline
from sdtrain.formats.stored_model import TRAINED_PX
from sdtrain.models.schedulers import sampling_scheduler
from sdtrain.models.unet import build_unet
from sdtrain.precision import torch_dtype
from sdtrain.sampling.sampler import load_networks
from tests.training_fixtures import write_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run whose raw weights are a fresh UNet's and whose average is those plus one."""
    return write_run(tmp_path_factory.mktemp("world"), ema_offset=1.0)


def test_weights_come_by_name_raw_and_averaged(run_dir):
    raw = open_model(run_dir).unet("raw").state_dict()
    ema = open_model(run_dir / "checkpoints" / "step-00000005").unet("ema").state_dict()
    assert raw["conv_in.weight"].shape == (16, 4, 3, 3)
    assert all(torch.equal(raw[name] + 1, ema[name]) for name in raw)


@pytest.mark.parametrize("kind", ["ema", "raw"])
def test_exported_folder_is_a_pipeline_that_generates(run_dir, tmp_path, kind):
    folder = export_model(run_dir, tmp_path / "out", ExportSettings(kind))
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    exported = pipeline.unet.state_dict()
    weights = open_model(run_dir).state(kind)
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)
    assert isinstance(pipeline.scheduler, PNDMScheduler)
    assert pipeline.safety_checker is None
    pipeline.set_progress_bar_config(disable=True)
    if kind == "raw":
        image = pipeline("a red circle", num_inference_steps=2).images[0]
        assert image.size == (64, 64)


def test_scheduler_is_the_one_of_published_sd_v1():
    config = sampling_scheduler(DiffusionConfig()).config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (config.skip_prk_steps, config.set_alpha_to_one, config.steps_offset) == (True, False, 1)
    assert (config.num_train_timesteps, config.prediction_type) == (1000, "epsilon")


def test_an_export_replaces_an_export_and_nothing_else(run_dir, tmp_path):
    output = export_model(run_dir, tmp_path / "out")
    (output / "stale").touch()
    export_model(run_dir, output)
    assert not (output / "stale").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    precious = tmp_path / "precious"
    precious.mkdir()
    with pytest.raises(UserError, match="not an earlier export"):
        export_model(run_dir, precious)


def test_a_failed_export_leaves_the_old_one(run_dir, tmp_path, monkeypatch):
    output = export_model(run_dir, tmp_path / "out")
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


def run_export(*arguments):
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.output.strip()


def test_the_command_converts_both_ways(run_dir, tmp_path):
    file, folder, tokenizer = tmp_path / "model.ckpt", tmp_path / "folder", run_dir.parent / "models"
    assert run_export(run_dir, file, "--weights", "both", "--dtype", "fp16") == str(file)
    assert run_export(file, folder, "--weights", "both", "--tokenizer", tokenizer) == str(folder)
    raw, average = (open_model(folder).state(weights) for weights in ("raw", "ema"))
    for name, tensor in open_model(run_dir).state("raw").items():
        assert torch.equal(raw[name], tensor.half().float())
    assert all(
        torch.equal(average[name], tensor.half().float()) for name, tensor in open_model(run_dir).state("ema").items()
    )
    assert {file.name for file in (folder / "unet").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.non_ema.safetensors",
    }


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_folder_holds_the_precision_asked_for(run_dir, tmp_path, dtype):
    folder = export_model(run_dir, tmp_path / "out", ExportSettings(dtype=dtype))
    for part in ("unet", "vae", "text_encoder"):
        for path in (folder / part).glob("*.safetensors"):
            assert {tensor.dtype for tensor in load_file(path).values()} == {torch_dtype(dtype)}
        assert "_name_or_path" not in (folder / part / "config.json").read_text()
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch_dtype(dtype))
    assert (pipeline.unet.dtype, pipeline.vae.dtype) == (torch_dtype(dtype), torch_dtype(dtype))


def test_both_kinds_cannot_come_from_a_model_that_has_one(run_dir, tmp_path):
    folder = export_model(run_dir, tmp_path / "out")
    for output in (tmp_path / "model.safetensors", tmp_path / "other"):
        with pytest.raises(UserError, match="has one kind of weights, so there are no raw weights"):
            run_export(folder, output, "--weights", "both")
        assert not output.exists()


def test_a_folder_of_that_name_is_not_replaced_by_a_file(run_dir, tmp_path):
    (tmp_path / "model.ckpt").mkdir()
    with pytest.raises(UserError, match="is a folder; choose another name"):
        run_export(run_dir, tmp_path / "model.ckpt")


def test_a_full_disk_leaves_no_file(run_dir, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = export_model(run_dir, tmp_path / "model.ckpt").read_bytes()
    monkeypatch.setattr("torch.save", fail)
    with pytest.raises(UserError, match="disk"):
        export_model(run_dir, tmp_path / "model.ckpt", ExportSettings("raw"))
    assert (tmp_path / "model.ckpt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.ckpt"]


@pytest.mark.parametrize("through", [None, "model.safetensors"])
def test_an_export_draws_at_its_training_size_whatever_sample_size_says(run_dir, tmp_path, through, capfd):
    settings = ExportSettings(tokenizer=str(run_dir.parent / "models"))
    source = export_model(run_dir, tmp_path / through, settings) if through else run_dir
    folder = export_model(source, tmp_path / "folder", settings)
    path = folder / "unet" / "config.json"
    config = json.loads(path.read_text())
    assert (config["sample_size"], config[TRAINED_PX]) == (8, [[64, 64]])
    StableDiffusionPipeline.from_pretrained(folder)
    assert TRAINED_PX not in "".join(capfd.readouterr())  # diffusers does not mind the note
    path.write_text(json.dumps(config | {"sample_size": 16}))
    assert load_networks(folder, "cpu").latent_size == 8
    path.write_text(json.dumps(config | {"sample_size": 16, TRAINED_PX: []}))
    assert load_networks(folder, "cpu").latent_size == 16  # nothing that is recorded speaks against it
