import hashlib
import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sdtrain.cli import app
from sdtrain.errors import UserError
from sdtrain.formats.export import export_model
from sdtrain.sampling.batch import Job, Model, all_devices, draw, make_jobs, make_seeded_jobs, rank_and_device
from sdtrain.sampling.output_folder import SampleFolder
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


def test_every_prompt_has_every_seed_once():
    assert make_seeded_jobs(["a"], [3, 7]) == [Job("a", 3), Job("a", 7)]
    expected = [Job("a", 3, 3), Job("a", 7, 4), Job("b", 3, 5), Job("b", 7, 6)]
    assert make_seeded_jobs(["a", "b", "a"], [3, 7]) == expected


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
    assert "5 images drawn, 0 kept" in sample(run, tmp_path, *prompts, "--redraw")


def records(folder):
    return {path.name: json.loads(Image.open(path).text["sdtrain"]) for path in sorted(folder.glob("0*.png"))}


def test_other_images_are_never_replaced(run, tmp_path):
    sample(run, tmp_path, "a red circle", "a blue square", "--grid")
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "2 images drawn, 0 kept" in sample(run, tmp_path, "a star", "a red circle", "--grid")
    assert "2 images drawn, 0 kept" in sample(run, tmp_path, "a red circle", "a blue square", "--sampler", "ddim")
    assert "1 images drawn, 1 kept" in sample(run, tmp_path, "a red circle", "a blue circle", "--batch-size", "1")
    assert "0 images drawn, 2 kept" in sample(run, tmp_path, "a star", "a red circle", "--grid")
    for name, content in first.items():
        assert (tmp_path / name).read_bytes() == content
    made = records(tmp_path)
    assert [(name[:5], it["prompt"], it["seed"], it["sampler"]) for name, it in made.items()] == [
        ("00000", "a red circle", 0, "default"),
        ("00001", "a blue square", 1, "default"),
        ("00002", "a star", 0, "default"),
        ("00003", "a red circle", 1, "default"),
        ("00004", "a red circle", 0, "ddim"),
        ("00005", "a blue square", 1, "ddim"),
        ("00006", "a blue circle", 1, "default"),
    ]
    assert sorted(path.name for path in tmp_path.glob("grid*")) == ["grid-1.png", "grid.png"]


def test_a_users_own_image_and_one_of_an_earlier_model_stay(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "00001.png")
    folder = export_model(run, tmp_path / "folder")
    output = tmp_path / "out"
    output.mkdir()
    (tmp_path / "00001.png").rename(output / "00001.png")
    sample(folder, output, "a red circle", "a blue square")
    assert list(records_or_none(output)) == ["00001.png", "00002.png", "00003.png"]
    old = (output / "00002.png").read_bytes()
    later = (output / "00003.png").stat().st_mtime + 10
    os.utime(folder / "model_index.json", (later, later))
    sample(folder, output, "a red circle")
    assert (output / "00000.png").exists()
    assert (output / "00002.png").read_bytes() == old


def records_or_none(folder):
    return sorted(path.name for path in folder.glob("0*.png"))


def test_ranks_that_start_late_find_the_same_numbers(run, tmp_path):
    sample(run, tmp_path, "a", "b", "c")
    model = Model(run / "checkpoints" / "step-00000005")
    settings = SampleSettings(2.0, 2, batch_size=2)
    jobs = make_jobs(["d", "e", "f", "g"], 1, 1)
    first = SampleFolder(tmp_path, model, settings).placed(jobs)
    assert [first.path(job).stem for job in jobs] == ["00003", "00004", "00005", "00006"]
    for drawn in ([2], [0, 2], [3]):
        for job in (jobs[number] for number in drawn):
            first.save(job, Image.new("RGB", (8, 8)))
        late = SampleFolder(tmp_path, model, settings).placed(jobs)
        assert late.numbers == first.numbers


def test_sizes_seeds_negative_prompt_and_start_image_are_recorded(run, tmp_path):
    Image.new("RGB", (50, 20), "red").save(tmp_path / "start.png")
    output, (width, height) = tmp_path / "out", (48, 72)
    options = ["--width", str(width), "--height", str(height), "--negative-prompt", "a star", "--seeds", "3,7-8"]
    options += ["--image", str(tmp_path / "start.png"), "--strength", "0.5", "--grid"]
    sample(run, output, "a red circle", "a blue square", *options)
    made = records(output)
    assert list(made) == [f"{number:05d}.png" for number in range(3, 9)]
    assert [it["seed"] for it in made.values()] == [3, 7, 8, 3, 7, 8]
    last = made["00008.png"]
    digest = hashlib.sha256((tmp_path / "start.png").read_bytes()).hexdigest()
    assert {name: last[name] for name in ("prompt", "negative_prompt", "width", "height", "strength")} == {
        "prompt": "a blue square",
        "negative_prompt": "a star",
        "width": width,
        "height": height,
        "strength": 0.5,
    }
    assert (last["image"], last["image_sha256"]) == ("start.png", digest)
    assert Image.open(output / "00003.png").size == (width, height)
    assert Image.open(output / "grid.png").size == (3 * 50 + 2, 2 * 74 + 2)
    assert "0 images drawn, 6 kept" in sample(run, output, "a red circle", "a blue square", *options)
    # An image depends on its own seed alone, whatever the batch.
    sample(run, tmp_path / "alone", "a blue square", *options[:6], "--seeds", "8", *options[8:-1])
    alone = np.asarray(Image.open(tmp_path / "alone" / "00008.png"), np.int16)
    assert np.abs(np.asarray(Image.open(output / "00008.png"), np.int16) - alone).max() <= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "1000"], "cannot be 1000 sampling steps: .* 1 to 999"),
        (["--steps", "1500", "--sampler", "dpm"], "1 to 998"),
        (["--seeds", "0-3", "--seed", "1"], "leave --seed and --per-prompt out"),
        (["--strength", "0.5"], "redrawn, and --image is missing"),
        (["--prompt-column", "text"], "--prompts-file, which is missing"),
        (["--width", "65"], "multiple of 8"),
        (["--seeds", "9-3"], "write ranges and numbers"),
    ],
)
def test_a_mistaken_option_is_a_sentence_before_anything_is_loaded(run, tmp_path, monkeypatch, options, words):
    monkeypatch.setattr("sdtrain.sampling.batch.load_networks", None)
    result = CliRunner().invoke(app, ["sample", str(run), "a", "--output", str(tmp_path), *options])
    assert isinstance(result.exception, UserError)
    assert re.search(words, str(result.exception))
    assert not list(tmp_path.iterdir())


def test_the_command_says_the_size_and_what_is_cut_off_prompts(run, tmp_path):
    long = " ".join(["a red circle"] * 30) + " on grass"
    arguments = ["sample", str(run), "a", long, "--output", str(tmp_path), "--guidance", "2", "--steps", "2"]
    said = CliRunner().invoke(app, [*arguments, "--negative-prompt", long, "--width", "48"]).stderr
    assert "warning: Images of 48 x 64 px, but" in said
    assert "was trained on 64 x 64: expect worse ones." in said
    assert "warning: the prompt “a red circle" in said
    assert "warning: the negative prompt “a red circle" in said
    assert said.count("on grass”.") == 2


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
