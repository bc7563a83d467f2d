import pytest
from PIL import Image

from sdtrain.report.training import draw_training
from sdtrain.training.run_dir import RunDir


@pytest.fixture
def run(tmp_path):
    made = RunDir(tmp_path / "run")
    made.log.truncate(0)
    made.validation.truncate(0)
    for step in range(10, 110, 10):
        made.log.add(step=step, loss=1 / step, images_per_s=100.0 + step)
        for weights, worse in (("ema", 0.0), ("raw", 1.0)):
            for timestep in (250, 750):
                made.validation.add(step=step, weights=weights, timestep=timestep, loss=worse + timestep / 1000 / step)
        made.previews.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(made.preview(step))
    return made


def test_it_shows_the_last_figures_and_previews_from_first_to_last(run, tmp_path):
    images = tmp_path / "pictures"
    images.mkdir()
    shown = draw_training(run, images)
    assert shown.text == "100 optimizer steps; last loss 0.010; loss on held-out samples 0.005; 160 images/s."
    steps = [step for _, step in shown.previews]
    assert len(steps) == 6
    assert (steps[0], steps[-1]) == (10, 100)
    assert steps == sorted(set(steps))
    for name in (shown.curve, shown.by_timestep, *(image for image, _ in shown.previews)):
        assert (tmp_path / name).stat().st_size > 0


def test_a_run_without_validation_and_previews_has_a_curve_only(tmp_path):
    run = RunDir(tmp_path / "run")
    run.log.truncate(0)
    run.log.add(step=1, loss=0.5, images_per_s=3.0)
    (tmp_path / "pictures").mkdir()
    shown = draw_training(run, tmp_path / "pictures")
    assert (shown.by_timestep, shown.previews) == (None, [])
    assert draw_training(RunDir(tmp_path / "none"), tmp_path / "pictures") is None
