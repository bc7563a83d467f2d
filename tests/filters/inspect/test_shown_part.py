"""The report of a large dataset reads a part of its shards, counts all, and shows nothing that is not so."""

import re
import shutil

import duckdb
import pytest

from filters.inspect import shown_part
from filters.inspect.report import report_on
from filters.inspect.views import write_views
from filters.recipe_record import record_recipe
from sdtrain.dataset.layout import DatasetDir
from sdtrain.errors import UserError
from tests.filters.dataset_fixtures import DECIDE, DOWNLOAD, NUM_ROWS, PER_SHARD, UNDECODABLE, make_dataset


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    dataset, recipe = make_dataset(tmp_path_factory.mktemp("data"))
    record_recipe(dataset, recipe)
    write_views(dataset, recipe)
    return dataset, recipe


@pytest.fixture
def narrowed(made, monkeypatch):
    dataset, recipe = made
    monkeypatch.setattr(shown_part, "MAX_SHARDS", 1)
    with duckdb.connect(str(dataset.database), read_only=True) as connection:
        text = shown_part.narrow(connection, dataset, recipe)
        yield connection, text


def shards(connection, view):
    return {shard for (shard,) in connection.execute(f"SELECT DISTINCT shard FROM {view}").fetchall()}


def test_all_views_show_the_same_shards_and_few_of_them(narrowed):
    connection, text = narrowed
    chosen = shards(connection, "decisions")
    assert 1 <= len(chosen) < 3
    assert text.startswith(f"Examples, histograms and comparisons are of {len(chosen)} of the 3 shards")
    for view in ("selection", "images", "scores", "kept"):
        assert shards(connection, view) == chosen, view


def test_a_group_of_duplicates_is_shown_with_all_its_members(narrowed):
    connection, _ = narrowed
    asked = "SELECT count(*) FROM duplicates LEFT JOIN images USING (uid) WHERE images.uid IS NULL"
    assert connection.execute(asked).fetchone() == (0,)


def test_rows_shown_as_dropped_by_the_metadata_were_so(narrowed, made):
    connection, _ = narrowed
    found = connection.execute("SELECT url, height FROM unselected").fetchall()
    assert len(found) == 5
    assert {height for _, height in found} == {100}


def test_a_small_dataset_is_shown_whole(made):
    dataset, recipe = made
    with duckdb.connect(str(dataset.database), read_only=True) as connection:
        assert shown_part.narrow(connection, dataset, recipe) == ""
        assert shards(connection, "selection") == {0, 1, 2}


def test_the_page_counts_all_and_says_what_it_shows(made, monkeypatch):
    dataset, recipe = made
    monkeypatch.setattr(shown_part, "MAX_SHARDS", 1)
    page = report_on(dataset, recipe).read_text()
    assert "of the 3 shards, drawn at random" in page
    facts = {name: int(count) for count, name in re.findall(r"<b>([0-9,]+)</b>([a-z ]+)", page)}
    assert (facts["selected"], facts["downloaded"]) == (NUM_ROWS - 5, NUM_ROWS - 5 - len(DOWNLOAD))
    dropped = sum(int(count) for count in re.findall(r"Dropped: \w+ \(([0-9]+)\)", page))
    assert dropped == len({**DOWNLOAD, **UNDECODABLE, **DECIDE})
    assert facts["kept"] + dropped == facts["selected"]
    assert facts["selected"] > PER_SHARD


def test_the_report_of_a_moved_dataset_is_a_sentence(made, tmp_path):
    dataset, recipe = made
    there = tmp_path / "there"
    shutil.copytree(dataset.root, there)
    write_views(DatasetDir(there), recipe)
    here = DatasetDir(there.rename(tmp_path / "here"))
    with pytest.raises(UserError, match=r"If the dataset was moved, run `sdtrain views .*/here`"):
        report_on(here, recipe)
