"""Galleries show what lies nearest to a limit with its value, and duplicates beside the kept one."""

from __future__ import annotations

import re
import shutil

import duckdb
import pyarrow.parquet as pq
import pytest
from PIL import Image

from filters.decide.stage import DECIDE
from filters.dedup.stage import DEDUP
from filters.inspect.report import report_on, rule_thresholds
from filters.inspect.views import write_views
from filters.recipe import Recipe
from filters.score.stage import SCORE
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.stage import run_batch
from sdtrain.report.examples import EXAMPLES_PER_SIDE, THUMBNAIL_PX, count_examples, galleries
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads

NO_MODELS = dict.fromkeys(("clip_weights", "aesthetic_weights", "watermark_weights", "safety_weights"))
SIDES = [500 + 10 * i for i in range(20)]  # the limit is 600


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    rules = {"min_side": 600, "min_similarity": 0.3, "no_filename_captions": True}
    return Recipe(name="small", score=NO_MODELS, duplicates={"level": "exact"}, decide={"rules": rules})


@pytest.fixture(scope="module")
def dataset(recipe, tmp_path_factory):
    """Images of growing size, four copies of one, some of low similarity, one that failed."""
    high = {"similarity": 0.4}
    rows = [
        Fetched(encoded(scene_image(i, 300, 200)), f"side {side}", (900, side), high) for i, side in enumerate(SIDES)
    ]
    rows += [Fetched(encoded(scene_image(30)), f"copy {i}", (900, 700 + i), high) for i in range(4)]
    rows += [Fetched(encoded(scene_image(40 + i)), f"low {i}", (900, 900), {"similarity": 0.2}) for i in range(3)]
    rows.append(Fetched(encoded(scene_image(50)), "long " * 100, (2000, 2000), high))
    dataset = write_downloads(tmp_path_factory.mktemp("data"), [*rows, Fetched(None, reason="http_404")])
    for stage in (SCORE, DEDUP, DECIDE):
        run_batch(stage, dataset, recipe, stage.shards(dataset, recipe))
    write_views(dataset, recipe)
    return dataset


@pytest.fixture
def shown(dataset, recipe, tmp_path):
    with duckdb.connect(str(dataset.database), read_only=True) as connection:
        found = galleries(connection, dataset, tmp_path, count_examples(connection), None, rule_thresholds(recipe))
    return {gallery.title: gallery for gallery in found}


def texts(row):
    return [shown.text for shown in row]


def test_nearest_to_a_limit_are_the_kept_just_over_and_the_dropped_just_under_it(shown):
    kept, dropped = shown["Nearest to min_side 600 (after the download)"].rows
    assert texts(kept) == [f"side {side}: side {side}" for side in (600, 610, 620, 630, 640, 650)]
    assert texts(dropped) == [f"side {side}: side {side}" for side in (590, 580, 570, 560, 550, 540)]
    assert len(kept) == len(dropped) == EXAMPLES_PER_SIDE
    assert {image.kept for image in kept} == {True}
    assert {image.kept for image in dropped} == {False}


def test_a_rule_on_the_metadatas_scores_shows_those(shown):
    kept, dropped = shown["Nearest to min_similarity 0.3 (after the download)"].rows
    assert {text.split(":")[0] for text in texts(kept)} == {"similarity 0.4"}
    assert sorted(texts(dropped)) == [f"similarity 0.2: low {i}" for i in range(3)]


def test_a_rule_without_a_number_has_no_limit_to_be_near(shown):
    assert not [title for title in shown if "no_filename_captions" in title]


def test_duplicates_stand_in_one_row_the_kept_one_first(shown):
    (row,) = shown["Duplicates (1 groups), the kept one first"].rows
    assert texts(row)[0] == "kept, 900x703"
    assert sorted(texts(row)[1:]) == [f"duplicate_exact, 900x{side}" for side in (700, 701, 702)]
    assert [image.kept for image in row] == [True, False, False, False]


def test_kept_ones_are_kept_and_every_reason_has_its_own(shown):
    assert all(image.kept for image in shown["Kept, at random"].rows[0])
    assert [text for text in texts(shown["Kept, at random"].rows[0]) if "long" in text] == ["long " * 31 + "long…"]
    assert len(shown["Dropped: min_side (10)"].rows[0]) == 10
    assert shown["Dropped: http_404 (1)"].lines
    assert not any(shown["Dropped: http_404 (1)"].rows)


def test_thumbnails_are_small_jpegs_that_are_loaded_when_they_are_seen(dataset, recipe):
    page = report_on(dataset, recipe).read_text()
    images = [tag for tag in re.findall(r"<img[^>]+>", page) if ".jpg" in tag]
    assert len(images) > 30
    assert all('loading="lazy"' in tag for tag in images)
    for path in (dataset.root / "pictures").glob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, max(image.size) <= THUMBNAIL_PX) == ("JPEG", True)


def test_tables_of_before_images_had_a_place_give_a_report_without_them(dataset, recipe, tmp_path):
    old = DatasetDir(shutil.copytree(dataset.root, tmp_path / "old"))
    for path in (old.root / "images").glob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["extension", "picture_offset", "picture_bytes"]), path)
    write_views(old, recipe)
    page = report_on(old, recipe).read_text()
    assert "Dropped: min_side (10)" in page
    assert not list((old.root / "pictures").glob("*.jpg"))
