import duckdb
import pytest
from PIL import Image

from filters.inspect.views import DERIVED
from sdtrain.report.plots import plot_pairs
from sdtrain.report.sections import draw_pairs, draw_training
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


SCORES = ("aesthetic", "pwatermark", "punsafe", "similarity", "aesthetic_v1")


@pytest.fixture
def connection():
    """Three scored images and a damaged one; similarity only on one side."""
    with duckdb.connect() as connection:
        rows = "('a', 4.0, 0.1, 0.5, 0.3, 7), ('b', 5.5, 0.2, 0.5, 0.3, NULL), ('c', 6.0, 0.3, 0.5, 0.3, NULL)"
        rows += ", ('d', 7, 0, 0, 0, 7)"
        connection.execute(f"CREATE TABLE selection AS FROM (VALUES {rows}) t(uid, {', '.join(SCORES)})")
        connection.execute(
            """
            CREATE TABLE scores AS
            FROM (VALUES ('a', 'k0', 0, 4.5, 0.1, NULL, NULL, 8, NULL), ('b', 'k1', 0, 4.9, 0.2, NULL, 0.5, 8, NULL),
                         ('c', 'k2', 0, 6.5, 0.3, NULL, 0.5, 8, NULL), ('d', 'k3', 0, 9, 9, 9, 9, 9, 'undecodable'))
            t(uid, key, shard, aesthetic, pwatermark, similarity, punsafe, aesthetic_v1, reason)
            """
        )
        connection.execute(f"CREATE VIEW score_pairs AS {DERIVED['score_pairs']}")
        yield connection


def test_each_score_that_both_have_is_drawn_with_how_far_they_agree(connection, tmp_path):
    drawn = draw_pairs(connection, {"min_aesthetic": 5.0}, tmp_path)
    names = ("aesthetic", "aesthetic_v1", "pwatermark", "punsafe")
    assert [pair["image"] for pair in drawn] == [f"pictures/{name}_pairs.png" for name in names]
    assert all((tmp_path / pair["image"].removeprefix("pictures/")).stat().st_size > 0 for pair in drawn)
    # By hand: differences 0.5, -0.6, 0.5; the second image is over the limit for the metadata only.
    assert drawn[0]["text"] == (
        "aesthetic score (V2): 3 images, ours +0.133 on average, correlation 0.817, 66.7 % on the same side of 5."
    )
    assert drawn[1]["text"] == "aesthetic score (V1): 1 images, ours +1 on average."
    assert drawn[2]["text"] == "P(watermark): 3 images, ours +0 on average, correlation 1.000."
    assert drawn[3]["text"] == "P(unsafe): 2 images, ours +0 on average.", "one value has no correlation"


def test_older_views_give_the_pairs_that_they_know(connection, tmp_path):
    connection.execute("CREATE OR REPLACE VIEW score_pairs AS SELECT 1.0 AS aesthetic_metadata, 2 AS aesthetic_image")
    assert [pair["image"] for pair in draw_pairs(connection, {}, tmp_path)] == ["pictures/aesthetic_pairs.png"]


def test_views_without_pairs_draw_nothing(tmp_path):
    with duckdb.connect() as connection:
        assert draw_pairs(connection, {}, tmp_path) == []


def test_the_plot_takes_what_is_small_or_empty(tmp_path):
    plot_pairs([], None, "score", tmp_path / "none.png")
    plot_pairs([(1.0, 1.0)], 0.5, "score", tmp_path / "one.png")
    assert len(list(tmp_path.glob("*.png"))) == 2
