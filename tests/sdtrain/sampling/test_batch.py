import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sdtrain.cli import app
from sdtrain.errors import UserError
from sdtrain.formats.export import export_model
from sdtrain.sampling.batch import Job, Model, all_devices, draw, make_jobs, rank_and_device, read_prompts
from sdtrain.sampling.sampler import SampleSettings
from tests.sdtrain.launching import deepspeed, finish, launch, torchrun
from tests.training_fixtures import write_run

QUICK = SampleSettings(guidance_scale=2.0, num_steps=2, batch_size=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with one checkpoint, whose averaged weights are not the raw ones."""
    return write_run(tmp_path_factory.mktemp("run"), ema_offset=0.02)


def test_every_image_has_its_own_seed():
    assert make_jobs(["a", "b"], 7, 2) == [Job("a", 7), Job("a", 8), Job("b", 9), Job("b", 10)]


def test_prompts_come_one_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\n  ein grüner Kreis \n", encoding="utf-8")
    assert read_prompts(path) == ["a red circle", "ein grüner Kreis"]


@pytest.mark.parametrize("content", [b"\n \n", b"\xff\xfe bad", None], ids=["empty", "not_utf8", "missing"])
def test_a_bad_file_of_prompts_is_a_sentence(tmp_path, content):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"prompts\.txt .*(one prompt a line|one a line)"):
        read_prompts(path)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert all_devices() == ["cuda:0", "cuda:1"]
    with pytest.raises(UserError, match="2 GPUs"):
        all_devices(3)


@pytest.mark.long
def test_two_processes_draw_what_one_draws(run):
    jobs, model = make_jobs(["a red circle", "a blue square", "a"], 3, 2), Model(run)
    alone = list(draw(model, jobs, QUICK, ["cpu"]))
    together = list(draw(model, jobs, QUICK, ["cpu", "cpu"]))
    assert [job for job, _ in together] == [job for job, _ in alone] == jobs
    for (_, ours), (_, theirs) in zip(together, alone, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert len({image.tobytes() for _, image in alone}) == len(jobs)


@pytest.mark.long
def test_a_mistake_in_another_process_is_a_sentence_here(tmp_path):
    with pytest.raises(UserError, match="neither a diffusers folder"):
        list(draw(Model(tmp_path), make_jobs(["a"], 0, 4), QUICK, ["cpu", "cpu"]))


def test_the_command_draws_from_a_run_and_says_in_each_image_how(run, tmp_path):
    (tmp_path / "more.txt").write_text("a green circle\n")
    options = ["--prompts-file", str(tmp_path / "more.txt"), "--seed", "4", "--per-prompt", "2", "--grid"]
    options += ["--guidance", "2", "--steps", "2", "--sampler", "ddim", "--weights", "raw"]
    output = tmp_path / "out"
    result = CliRunner().invoke(app, ["sample", str(run), "a red circle", "--output", str(output), *options])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in output.iterdir()) == [*(f"{n:05d}.png" for n in range(4, 8)), "grid.png"]
    made = json.loads(Image.open(output / "00006.png").text["sdtrain"])
    assert made["version"]
    assert {name: made[name] for name in ("prompt", "seed", "sampler", "weights", "num_steps")} == {
        "prompt": "a green circle",
        "seed": 6,
        "sampler": "ddim",
        "weights": "raw",
        "num_steps": 2,
    }
    assert Image.open(output / "grid.png").size == (2 * 66 + 2, 2 * 66 + 2)


def test_averaged_and_raw_weights_draw_different_images(run):
    jobs = make_jobs(["a red circle"], 0, 1)
    ema, raw = (next(draw(Model(run, which), jobs, QUICK, ["cpu"]))[1] for which in ("ema", "raw"))
    assert ema.tobytes() != raw.tobytes()


def test_a_pipeline_has_no_raw_weights(run, tmp_path):
    folder = export_model(run, tmp_path / "out")
    with pytest.raises(UserError, match="no raw weights"):
        next(draw(Model(folder, "raw"), make_jobs(["a"], 0, 1), QUICK, ["cpu"]))


def test_no_prompt_at_all_is_a_sentence(tmp_path):
    result = CliRunner().invoke(app, ["sample", str(tmp_path)])
    assert isinstance(result.exception, UserError)
    assert "--prompts-file" in str(result.exception)


@pytest.fixture(scope="module")
def file(run, tmp_path_factory):
    """The run as a CompVis file."""
    return export_model(run, tmp_path_factory.mktemp("file") / "model.safetensors")


def test_a_run_its_folder_and_its_file_draw_the_same_image(run, file, tmp_path):
    folder, jobs = export_model(run, tmp_path / "folder"), make_jobs(["a red circle"], 0, 2)
    models = [Model(run), Model(folder), Model(file, tokenizer=str(run.parent / "models"))]
    drawn = [[image.tobytes() for _, image in draw(model, jobs, QUICK, ["cpu"])] for model in models]
    assert drawn[0] == drawn[1] == drawn[2]


def sample(run, output, *options):
    arguments = ["sample", str(run), "--output", str(output), "--guidance", "2", "--steps", "2", "--batch-size", "2"]
    result = CliRunner().invoke(app, [*arguments, *options])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_an_interrupted_command_goes_on_where_it_was(run, tmp_path):
    prompts = ["a red circle", "a blue square", "a", "a green circle", "a red square", "--keep"]
    assert "5 images drawn, 0 kept" in sample(run, tmp_path, *prompts)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "00003.png").unlink()
    (tmp_path / "00004.png").write_bytes(before["00004.png"][:100])
    assert "3 images drawn, 2 kept" in sample(run, tmp_path, *prompts)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert "0 images drawn, 5 kept" in sample(run, tmp_path, *prompts, "--grid")
    assert (tmp_path / "grid.png").exists()
    assert "5 images drawn, 0 kept" in sample(run, tmp_path, *prompts, "--sampler", "ddim")
    other = ["a red circle", "a blue square", "a", "a green circle", "a blue circle", "--keep", "--sampler", "ddim"]
    assert "1 images drawn, 4 kept" in sample(run, tmp_path, *other)


def test_the_checkpoint_is_chosen_when_the_command_begins(run, tmp_path):
    sample(run, tmp_path, "a")
    made = json.loads(Image.open(tmp_path / "00000.png").text["sdtrain"])
    assert made["model"] == str(run / "checkpoints" / "step-00000005")


@pytest.fixture
def one_thread():
    """As in the ranks, because sums of several threads round in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "launcher", [pytest.param("torchrun", marks=pytest.mark.slow), pytest.param("deepspeed", marks=pytest.mark.long)]
)
def test_two_ranks_draw_what_one_process_draws(run, tmp_path, launcher, one_thread):
    prompts = ["a red circle", "a blue square", "a", "a green circle", "a red square"]
    options = ["--guidance", "2", "--steps", "2", "--batch-size", "2", "--grid"]
    sample(run, tmp_path / "one", *prompts, "--grid")
    command = {
        "torchrun": [*torchrun(2, "-m"), "sdtrain.cli"],
        "deepspeed": [*deepspeed(2, "--no_local_rank"), "--module", "sdtrain.cli"],
    }[launcher]
    code, said = finish(launch([*command, "sample", run, *prompts, *options, "--output", tmp_path / "two"]))
    assert code == 0, said
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert len(one) == len(prompts) + 1
    assert one == two


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert rank_and_device() == (2, 4, "cuda:2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="Rank 2 of this machine has no GPU: there are 2"):
        rank_and_device()
