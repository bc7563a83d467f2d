"""Validation, previews and curves of a real run, on one rank."""

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdtrain.config import load_config
from sdtrain.errors import UserError
from sdtrain.formats.frozen import load_text_encoder
from sdtrain.loading.latent_store import LatentStore
from sdtrain.loading.loader import BatchMaker
from sdtrain.loading.sources import make_plan
from sdtrain.train import train
from sdtrain.training.distributed import Ranks
from sdtrain.training.monitor import Trackers, warn_of_truncated_previews
from sdtrain.training.run_dir import RunDir
from sdtrain.training.validation import Validation
from tests.training_fixtures import write_config, write_models

NUM_HELD_OUT = 10
WATCHED = {
    "validation": {"num_samples": NUM_HELD_OUT, "every": 2, "num_timesteps": 4},
    "previews": {"every": 4, "prompts": ["a red circle", "a blue square", "a"], "guidance_scale": 2, "num_steps": 3},
}


@pytest.fixture(scope="module")
def config(world, tmp_path_factory):
    return load_config(str(write_config(tmp_path_factory.mktemp("config") / "c.yaml", *world, **WATCHED)))


@pytest.fixture(scope="module")
def run(config, ranks, tmp_path_factory):
    made = RunDir(tmp_path_factory.mktemp("run"))
    train(config, made, ranks)
    return made


def test_validation_is_written_for_averaged_and_raw_weights_at_each_timestep(run):
    rows = run.validation.rows()
    assert {(row["weights"], row["timestep"]) for row in rows} == {
        (weights, timestep) for weights in ("ema", "raw") for timestep in ("125", "375", "625", "875")
    }
    assert sorted({int(row["step"]) for row in rows}) == [2, 4, 6, 8]


def test_watching_does_not_change_what_is_trained(run, config, ranks, tmp_path):
    """All but the held-out samples, which are the one thing that is another run."""
    quiet = config.model_copy(
        update={
            "validation": config.validation.model_copy(update={"every": 1000}),
            "previews": config.previews.model_copy(update={"every": 0}),
        }
    )
    assert quiet.digest() == config.digest()
    train(quiet, RunDir(tmp_path), ranks)
    figures = [[(row["loss"], row["grad_norm"]) for row in some.log.rows()] for some in (run, RunDir(tmp_path))]
    assert figures[0] == figures[1]


def test_a_resumed_run_has_the_validation_and_the_images_of_a_straight_one(run, config, ranks, tmp_path):
    asked = iter(range(5))
    resumed = RunDir(tmp_path)
    assert train(config, resumed, ranks, stop_requested=lambda: next(asked, None) is None) == 5
    train(config, resumed, ranks)
    assert resumed.validation.rows() == run.validation.rows()
    assert resumed.preview(8).read_bytes() == run.preview(8).read_bytes()


def test_a_previews_prompt_that_is_cut_is_shown(tmp_path, capsys):
    previews = {"every": 4, "prompts": ["a red circle", " ".join(["a red circle"] * 40) + " unseen"]}
    models = write_models(tmp_path / "models")
    config = load_config(str(write_config(tmp_path / "c.yaml", models, tmp_path, previews=previews)))
    capsys.readouterr()
    warn_of_truncated_previews(config)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: the preview's prompt “a red circle a red")
    assert line.endswith(" unseen”.")


def test_previews_show_every_prompt(run):
    sheets = sorted(run.previews.iterdir())
    assert [sheet.name for sheet in sheets] == ["step-00000004.png", "step-00000008.png"]
    pixels = np.asarray(Image.open(sheets[-1]))
    assert pixels.shape == (2 * 66 + 2, 2 * 66 + 2, 3)
    tiles = [pixels[2:66, 2:66], pixels[2:66, 68:132], pixels[68:132, 2:66]]
    assert all(tile.std() > 0 for tile in tiles)


def test_tensorboard_has_all_curves(run):
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/grad_norm", "validation/loss_ema", "validation/ema_t0125", "speed/data_wait"} <= tags
    assert [point.step for point in events.Scalars("train/loss")] == list(range(1, 9))
    parts = [tag for tag in tags if tag.startswith("train/loss_part_")]
    assert 0 < len(parts) <= 10


def test_the_loss_lies_between_its_parts(run):
    for row in run.log.rows():
        parts = [float(value) for name, value in row.items() if name.startswith("loss_part_") and value]
        assert min(parts) - 1e-9 <= float(row["loss"]) <= max(parts) + 1e-9


def test_held_out_samples_are_in_no_batch(world, config):
    store = LatentStore(world[1], 64)
    plan = make_plan(store, config, NUM_HELD_OUT)
    seen = np.concatenate([plan.batch(step).indices for step in range(20)])
    assert set(seen.tolist()) == set(range(len(store) - NUM_HELD_OUT))


class Partial(Ranks):
    """One of several ranks, whose sums are left to the test."""

    def sum(self, values):
        return values


def test_any_number_of_ranks_gives_the_same_losses(world, config):
    tokenizer, _ = load_text_encoder(str(world[0]))

    def found(rank, world_size):
        maker = BatchMaker(LatentStore(world[1], 64), tokenizer, config, 0, 1)
        ranks = Partial(rank, world_size, torch.device("cpu"), None, None)
        return Validation(config, maker, ranks).losses(lambda b: b.noise.square().mean((1, 2, 3)) * b.timesteps)

    alone = found(0, 1)
    together = np.sum([found(rank, 3) for rank in range(3)], axis=0)
    assert together == pytest.approx(alone, rel=1e-12)
    assert alone == sorted(alone)  # the stand-in grows with the timestep


def test_every_rank_says_as_often_that_validation_moves(world, config):
    """The watchdog compares these numbers; 10 samples over 3 ranks are 4, 3 and 3, in batches of 1, 2 and 4."""
    tokenizer, _ = load_text_encoder(str(world[0]))
    for size, num_batches in ((1, 4), (2, 2), (4, 1)):
        told = [0, 0, 0]
        for rank in range(3):
            small = config.model_copy(update={"micro_batch_size": size})
            maker = BatchMaker(LatentStore(world[1], 64), tokenizer, small, 0, 1)
            ranks = Partial(rank, 3, torch.device("cpu"), None, None)

            def moved(rank=rank, told=told):
                told[rank] += 1

            Validation(small, maker, ranks).losses(lambda b: b.noise.square().mean((1, 2, 3)), moved)
        assert told == [num_batches] * 3


def test_holding_out_everything_is_refused(world, config):
    greedy = config.model_copy(update={"validation": config.validation.model_copy(update={"num_samples": 50})})
    with pytest.raises(UserError, match=r"validation\.num_samples 50 leaves nothing"):
        make_plan(LatentStore(world[1], 64), greedy, 50)


def config_of(tmp_path, **changes):
    return load_config(str(write_config(tmp_path / "config.yaml", tmp_path, tmp_path, **changes)))


def read(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def test_tensorboard_shows_what_was_tracked(tmp_path):
    trackers = Trackers(tmp_path, config_of(tmp_path), 0)
    trackers.scalars(1, {"train/loss": 0.5, "speed/mfu": 0.25})
    trackers.image(1, "previews", Image.new("RGB", (8, 4), "red"))
    trackers.close()
    events = read(tmp_path)
    assert [(point.step, point.value) for point in events.Scalars("train/loss")] == [(1, 0.5)]
    image = events.Images("previews")[0]
    assert (image.width, image.height) == (8, 4)


def test_steps_that_are_done_again_after_a_resume_are_shown_once(tmp_path):
    config = config_of(tmp_path)
    first = Trackers(tmp_path, config, 0)
    for step in range(1, 6):
        first.scalars(step, {"train/loss": step / 10})
    first.close()
    second = Trackers(tmp_path, config, 3)
    second.scalars(4, {"train/loss": 9.0})
    second.close()
    shown = [(point.step, round(point.value, 3)) for point in read(tmp_path).Scalars("train/loss")]
    assert shown == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 9.0)]


def test_weights_and_biases_gets_one_run_for_all_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = config_of(tmp_path, tracking={"wandb_project": "toy"})
    for first_step in (0, 2):
        trackers = Trackers(tmp_path, config, first_step)
        trackers.scalars(first_step + 1, {"train/loss": 0.5})
        trackers.close()
    name = (tmp_path / "wandb-id").read_text().strip()
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert runs
    assert all(run.endswith(name) for run in runs)


def test_without_a_login_weights_and_biases_is_refused_with_a_sentence(tmp_path, monkeypatch):
    import wandb

    def refuses(**settings):
        raise wandb.errors.UsageError("api_key not configured")

    monkeypatch.setattr("wandb.init", refuses)
    with pytest.raises(UserError, match="wandb login"):
        Trackers(tmp_path, config_of(tmp_path, tracking={"wandb_project": "toy"}), 0)


def test_previews_and_validation_mark_graphs_and_give_them_the_training_shape(world, ranks, tmp_path, monkeypatch):
    """The network says that it is compiled, and is not: nothing of that is to be seen but marks and shapes."""
    seen = []
    speed = {"compile": "whole", "compile_mode": "reduce-overhead"}
    config = load_config(str(write_config(tmp_path / "c.yaml", *world, **WATCHED, speed=speed, steps=4)))
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, **_: module.register_forward_pre_hook(
            lambda module, inputs: seen.append(tuple(tuple(tensor.shape) for tensor in inputs))
        ),
    )
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: seen.append("mark"))
    train(config, RunDir(tmp_path / "run"), ranks)
    assert len(seen) > 2 * 8
    assert seen[::2] == ["mark"] * (len(seen) // 2)
    size = config.micro_batch_size
    assert set(seen[1::2]) == {((size, 4, 8, 8), (size,), (size, 16, 64))}
