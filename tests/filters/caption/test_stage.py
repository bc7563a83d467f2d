"""Every caption of an image stands in its shard's table, with its source and the row that it comes from."""

import shutil

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from filters.caption.duplicates import duplicate_texts
from filters.caption.stage import CAPTION
from filters.caption_config import CaptionConfig
from filters.inspect.status import dataset_status
from filters.inspect.views import write_views
from filters.pipeline import OTHER_VIEWS, STAGES, stages_of
from filters.preflight import sized_checks
from filters.recipe import Recipe
from filters.recipe_record import record_recipe
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import read_entry
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.errors import UserError
from sdtrain.settings import parse_settings
from tests.filters.dataset_fixtures import make_dataset

ON = {"from_duplicates": True}


def asking(recipe, **settings):
    return recipe.model_copy(
        update={
            "caption": CaptionConfig(**ON | settings),
            "duplicates": recipe.duplicates.model_copy(update={"level": "exact"}),
        }
    )


def rows_of(dataset):
    paths = [dataset.captions_table(shard) for shard in range(3)]
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def texts_of(dataset, uid):
    return [(row["text"], row["origin_uid"]) for row in rows_of(dataset) if row["uid"] == uid]


def change(path, uid, **values):
    rows = pq.read_table(path)
    changed = [row | (values if row["uid"] == uid else {}) for row in rows.to_pylist()]
    pq.write_table(pa.Table.from_pylist(changed, rows.schema), path)


def group(dataset, uids):
    rows = [{"uid": uid, "group_id": min(uids), "kind": "exact"} for uid in uids]
    schema = pq.read_schema(dataset.duplicates)
    pq.write_table(pa.Table.from_pylist(rows, schema), dataset.duplicates)


def images(dataset):
    return [row for shard in range(3) for row in pq.read_table(dataset.images_table(shard)).to_pylist()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def made(plain, tmp_path):
    dataset, recipe = DatasetDir(shutil.copytree(plain[0].root, tmp_path / "data")), asking(plain[1])
    record_recipe(dataset, recipe)
    return dataset, recipe


def test_an_image_has_its_alt_text_and_those_of_its_duplicates(made):
    dataset, recipe = made
    kept, first, second = (images(dataset)[number] for number in (5, 6, 33))
    group(dataset, [row["uid"] for row in (kept, first, second)])
    run_batch(CAPTION, dataset, recipe, [0, 1, 2])
    called = [(row["caption"], row["uid"]) for row in (kept, first, second)]
    assert texts_of(dataset, kept["uid"]) == called
    assert texts_of(dataset, second["uid"]) == [called[2], called[0], called[1]], "whichever DECIDE keeps has all"
    alone = images(dataset)[7]
    assert texts_of(dataset, alone["uid"]) == [(alone["caption"], alone["uid"])]
    assert {row["source"] for row in rows_of(dataset)} == {"alt"}
    assert {row["num_tokens"] for row in rows_of(dataset)} <= {4, 5}, "start, caption, one digit or two, end"
    entries = [read_entry(dataset, "caption", shard) for shard in range(3)]
    scored = [read_entry(dataset, "score", shard) for shard in range(3)]
    assert [entry.num_in for entry in entries] == [entry.num_out for entry in scored]
    assert pending(CAPTION, dataset, recipe) == []


def test_a_text_counts_once_and_an_empty_one_is_none(made):
    dataset, recipe = made
    kept, same, empty = (images(dataset)[number] for number in (5, 6, 7))
    change(dataset.images_table(0), same["uid"], caption=kept["caption"])
    change(dataset.images_table(0), empty["uid"], caption=" ")
    group(dataset, [row["uid"] for row in (kept, same, empty)])
    run_batch(CAPTION, dataset, recipe, [0])
    rows = pq.read_table(dataset.captions_table(0)).to_pylist()
    found = {row["uid"]: [] for row in (kept, same, empty)}
    for row in rows:
        found.get(row["uid"], []).append((row["text"], row["origin_uid"]))
    assert found[kept["uid"]] == [(kept["caption"], kept["uid"])]
    assert found[same["uid"]] == [(kept["caption"], same["uid"])], "its own"
    assert found[empty["uid"]] == [(kept["caption"], kept["uid"])]


def test_a_row_of_the_same_url_tells_its_text_if_its_fetch_failed_for_a_passing_reason(made):
    dataset, recipe = made
    image, timeout, gone, other = (images(dataset)[number] for number in (8, 2, 0, 15))
    for row in (timeout, gone):
        change(dataset.images_table(0), row["uid"], url=image["url"])
    change(dataset.images_table(1), other["uid"], url=image["url"], reason="hash_mismatch")
    run_batch(CAPTION, dataset, recipe, [0, 1, 2])
    assert texts_of(dataset, image["uid"]) == [(row["caption"], row["uid"]) for row in (image, timeout)]


def test_of_very_many_duplicates_the_first_few_tell_their_texts(made):
    dataset, recipe = made
    together = images(dataset)[16:36]
    group(dataset, [row["uid"] for row in together])
    recipe = asking(recipe, max_from_duplicates=3)
    run_batch(CAPTION, dataset, recipe, [0, 1, 2])
    last = together[-1]
    expected = [last, *together[:3]]
    assert texts_of(dataset, last["uid"]) == [(row["caption"], row["uid"]) for row in expected]


def test_the_texts_are_collected_once_for_all_shards_and_again_for_other_groups(made):
    dataset, recipe = made
    two = images(dataset)[5:7]
    assert set(duplicate_texts(dataset, recipe.caption, 0)) == {row["uid"] for row in two}
    collected = dataset.duplicate_texts.stat().st_mtime_ns
    assert duplicate_texts(dataset, recipe.caption, 2) == {}
    assert dataset.duplicate_texts.stat().st_mtime_ns == collected
    assert duplicate_texts(dataset, CaptionConfig(**ON, max_from_duplicates=1), 0)
    assert dataset.duplicate_texts.stat().st_mtime_ns != collected


@pytest.mark.parametrize("rows_in_group", [1, 2, 3, 7])
def test_each_shard_reads_its_own_part_of_the_collection(made, rows_in_group):
    dataset, recipe = made
    rows = [row for row in images(dataset) if row["reason"] is None]
    together = [row["uid"] for row in (*rows[5:9], *rows[20:])]
    group(dataset, together)
    expected = [duplicate_texts(dataset, recipe.caption, shard) for shard in range(4)]
    assert sorted(uid for found in expected for uid in found) == sorted(together)
    collected = pq.read_table(dataset.duplicate_texts)
    pq.write_table(collected, dataset.duplicate_texts, row_group_size=rows_in_group)
    assert [duplicate_texts(dataset, recipe.caption, shard) for shard in range(4)] == expected


def test_a_second_run_gives_the_same_bytes(made):
    dataset, recipe = made
    run_batch(CAPTION, dataset, recipe, [0, 1, 2])
    before = [dataset.captions_table(shard).read_bytes() for shard in range(3)]
    dataset.duplicate_texts.unlink()
    run_batch(CAPTION, dataset, recipe, [2, 0])
    run_batch(CAPTION, dataset, recipe, [1])
    assert [dataset.captions_table(shard).read_bytes() for shard in range(3)] == before


def test_the_view_has_every_row(made):
    dataset, recipe = made
    run_batch(CAPTION, dataset, recipe, [0, 1, 2])
    with duckdb.connect(write_views(dataset, recipe), read_only=True) as connection:
        described = connection.execute("SELECT * FROM captions LIMIT 0").description
        assert [column[0] for column in described] == list(CAPTION.table.columns)
        rows = connection.execute("SELECT uid, text, shard FROM captions ORDER BY shard, uid, text").fetchall()
    assert len(rows) == len(rows_of(dataset))
    assert {shard for *_, shard in rows} == {0, 1, 2}


def test_a_stage_that_is_off_shows_nowhere_and_does_nothing(plain):
    dataset, recipe = plain
    record_recipe(dataset, recipe)
    assert CAPTION in STAGES
    assert CAPTION not in stages_of(recipe)
    assert pending(CAPTION, dataset, recipe) == []
    assert "caption" not in [stage.stage for stage in dataset_status(dataset).stages]
    with duckdb.connect(write_views(dataset, recipe), read_only=True) as connection:
        names = {name for (name,) in connection.execute("SHOW TABLES").fetchall()}
    assert "captions" not in names
    assert set(OTHER_VIEWS) <= names
    assert "caption" not in sized_checks(dataset, recipe, 1000, stages_of(recipe), 1.0)[0].open()


def test_texts_of_duplicates_need_a_search_for_them():
    with pytest.raises(UserError, match=r"duplicates\.level is off"):
        parse_settings(Recipe, {"name": "r", "caption": ON}, "recipe")
    content = {"name": "r", "caption": ON, "duplicates": {"level": "exact"}, "select": {"carry": ["captions"]}}
    with pytest.raises(UserError, match="packed samples hold those of `caption`"):
        parse_settings(Recipe, content, "recipe")
