"""The report shows every reason with its count, and only images that exist."""

from __future__ import annotations

import re

import pytest

from filters.decide.funnel import remarks
from filters.decide.stage import DECIDE
from filters.dedup import DEDUP
from filters.inspect.report import finish_dataset, report_on, scores_note
from filters.inspect.views import write_views
from filters.recipe import Recipe
from filters.score.stage import SCORE
from filters.select.stage import SELECT
from sdtrain.dataset.stage import run_batch
from sdtrain.errors import UserError
from sdtrain.report.page import Report, write_report
from sdtrain.report.plots import plot_funnel, plot_histogram, plot_loss
from sdtrain.settings import parse_settings
from sdtrain.training.run_dir import RunDir
from tests.filters.embedded_fixtures import SCORED
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads


def test_every_reason_is_shown_with_its_count(dataset, recipe):
    page = report_on(dataset, recipe).read_text()
    for reason in ("http_404", "timeout", "undecodable", "min_side", "duplicate_exact"):
        assert f"Dropped: {reason} (1)" in page
    assert re.search(r"<b>7</b>kept", page)


def test_what_it_says_was_dropped_and_kept_adds_up_to_what_was_selected(dataset, recipe):
    page = report_on(dataset, recipe).read_text()
    facts = {name: int(count) for count, name in re.findall(r"<b>([0-9,]+)</b>([a-z ]+)", page)}
    dropped = sum(int(count) for count in re.findall(r"Dropped: \w+ \(([0-9]+)\)", page))
    assert facts["selected"] == 12
    assert facts["kept"] + dropped == facts["selected"]


def test_images_fetched_anew_are_shown_anew(recipe, tmp_path):
    def shown(seed: int) -> bytes:
        # Another length, so that the offsets of the first shard are wrong in the second.
        images = [encoded(scene_image(seed + i, 96 + seed, 80)) for i in range(3)]
        dataset = write_downloads(tmp_path, [Fetched(image, original_px=(600, 600)) for image in images])
        for stage in (SCORE, DEDUP, DECIDE):
            run_batch(stage, dataset, recipe, stage.shards(dataset, recipe))
        write_views(dataset, recipe)
        report_on(dataset, recipe)
        found = sorted((tmp_path / "pictures").glob("0*.jpg"))
        assert len(found) == 3
        return found[2].read_bytes()

    assert shown(0) != shown(40)


def test_a_training_that_has_logged_nothing_has_no_curve(dataset, tmp_path):
    (tmp_path / "log.csv").write_text("step,loss,images_per_s\n")
    report = Report("small", "", dataset, limits={}, training=RunDir(tmp_path))
    page = write_report(report, tmp_path / "report.html").read_text()
    assert "loss.png" not in page


def test_every_image_it_names_exists(dataset, recipe):
    report = report_on(dataset, recipe)
    sources = re.findall(r'src="([^"]+)"', report.read_text())
    assert len(sources) >= 3 + 7 + 2
    assert all((report.parent / source).stat().st_size > 0 for source in sources)


def test_the_same_dataset_gives_the_same_page_and_images(dataset, recipe, digests):
    report_on(dataset, recipe)
    first = digests(dataset)
    report_on(dataset, recipe)
    assert digests(dataset) == first


def test_it_is_written_by_the_build_only_when_something_was_done(dataset, recipe):
    finish_dataset(dataset, recipe)
    written = dataset.report.stat().st_mtime_ns
    finish_dataset(dataset, recipe)
    assert dataset.report.stat().st_mtime_ns == written
    run_batch(DECIDE, dataset, recipe, [0])
    finish_dataset(dataset, recipe)
    assert dataset.report.stat().st_mtime_ns > written


def test_scores_of_networks_that_learnt_nothing_are_said_to_mean_nothing(recipe):
    def with_clip(weights):
        return recipe.model_copy(update={"score": recipe.score.model_copy(update={"clip_weights": weights})})

    assert "those of clip" in scores_note(with_clip("random-full:0"))
    assert "clip" not in scores_note(with_clip("openai"))


def test_duplicates_by_random_weights_are_said_to_mean_nothing(tmp_path):
    dataset = write_downloads(tmp_path, [Fetched(encoded(scene_image(number))) for number in range(3)])
    for clip, sscd, num_said in (("random:0", None, 1), (None, None, 0), (None, "random:0", 1)):
        score = SCORED | {"clip_weights": clip, "sscd_weights": sscd}
        recipe = parse_settings(Recipe, {"name": "few", "score": score}, "recipe.yaml")
        for stage in (SCORE, DEDUP):
            run_batch(stage, dataset, recipe, stage.shards(dataset, recipe))
        said = remarks(dataset, recipe, (SELECT, SCORE, DEDUP))
        assert sum("random weights" in remark for remark in said) == num_said


def test_a_dataset_without_decisions_is_a_sentence(tmp_path, recipe):
    empty = write_downloads(tmp_path, [Fetched(encoded(scene_image(1)), original_px=(600, 600))])
    with pytest.raises(UserError, match=r"There is no .*metadata\.duckdb"):
        report_on(empty, recipe)
    write_views(empty, recipe)
    with pytest.raises(UserError, match="not built to its decisions"):
        report_on(empty, recipe)


def test_plots_take_what_is_small_or_empty(tmp_path):
    plot_funnel([("rows", 0, 1)], tmp_path / "funnel.png")
    plot_histogram({"metadata": [], "kept": []}, None, "score", tmp_path / "histogram.png")
    plot_loss([(10, 0.5)], [], tmp_path / "loss.png")
    assert len(list(tmp_path.glob("*.png"))) == 3
