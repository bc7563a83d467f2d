import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sdtrain.config import load_config
from sdtrain.errors import UserError
from sdtrain.training.trackers import Trackers
from tests.training_fixtures import write_config


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
