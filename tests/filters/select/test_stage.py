"""Selection: reasons in order, exact shards, the same bytes whatever the threads and the order of files."""

import hashlib
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from filters.recipe import Recipe
from filters.select.shard_writer import shard_key
from filters.select.stage import SELECT, _digest
from filters.select_config import SelectConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.errors import UserError
from tests.filters.select.metadata_fixtures import rows_of, select, url, write

LAION = Path(__file__).parents[4] / "shared" / "data" / "laion400m_url_text.parquet"
NAN = float("nan")


def compute_key(index, shard, digits, shard_digits):
    """A key is the shard's number and the index side by side; the download test compares with img2dataset itself."""
    return f"{shard:0{shard_digits}d}{index:0{digits}d}"


def test_every_row_that_is_dropped_has_the_first_reason_in_order(tmp_path):
    cases = [
        (None, 600.0, 6.0, 0.1, "url_missing"),
        ("", 600.0, 6.0, 0.1, "url_missing"),
        ("ftp://example.com/a", 100.0, 6.0, 0.1, "min_side"),
        ("ftp://example.com/a", 600.0, 6.0, 0.1, "url_not_allowed"),
        ("http://127.0.0.1/a", 600.0, 6.0, 0.1, "url_not_allowed"),
        (url(1), 511.0, 1.0, 0.9, "min_side"),
        (url(2), NAN, 6.0, 0.1, "side_missing"),
        (url(3), 600.0, 5.0, 0.1, "min_aesthetic"),
        (url(4), 600.0, None, 0.9, "aesthetic_missing"),
        (url(5), 600.0, 6.0, None, "pwatermark_missing"),
        (url(6), 600.0, 6.0, 0.5, "max_watermark"),
        (url(7), 512.0, 5.1, 0.49, None),
        (url(7), 900.0, 5.1, 0.49, "duplicate_row"),
        (url(8), 600.0, 6.0, 0.1, None),
    ]
    urls, sides, scores, watermarks, reasons = zip(*cases, strict=True)
    write(
        tmp_path / "metadata" / "a.parquet",
        URL=list(urls),
        TEXT=["t"] * len(cases),
        WIDTH=list(sides),
        HEIGHT=[2000.0] * len(cases),
        AESTHETIC_SCORE=pa.array(scores, pa.float32()),
        pwatermark=list(watermarks),
    )
    rules = {"min_side": 512, "min_aesthetic": 5.0, "max_watermark": 0.5}
    dataset, report = select(tmp_path, rules=rules)
    assert report.dropped == {reason: reasons.count(reason) for reason in set(reasons) - {None}}
    assert (report.num_in, report.num_out) == (len(cases), 2)
    # Of two rows with one uid, always the same one stays.
    assert {(row["url"], row["width"]) for row in rows_of(dataset)} == {(url(7), 512), (url(8), 600)}


def test_a_caption_may_be_missing_unless_a_rule_wants_one(tmp_path):
    write(tmp_path / "metadata" / "a.parquet", URL=[url(1), url(2)], TEXT=[None, "four"])
    dataset, _ = select(tmp_path)
    assert sorted(row["caption"] for row in rows_of(dataset)) == ["", "four"]
    _, report = select(tmp_path, rules={"min_caption_chars": 3})
    assert report.dropped == {"min_caption_chars": 1}


def test_with_score_later_missing_scores_pass_and_present_ones_count(tmp_path):
    scores = pa.array([4.0, None, 6.0], pa.float32())
    write(tmp_path / "metadata" / "a.parquet", URL=list(map(url, range(3))), TEXT=["t"] * 3, AESTHETIC_SCORE=scores)
    _, report = select(tmp_path, rules={"min_aesthetic": 5.0, "max_watermark": 0.5}, null_policy="score_later")
    assert report.dropped == {"min_aesthetic": 1}


def test_uid_is_the_md5_of_url_and_caption_and_keys_are_those_of_img2dataset(tmp_path):
    write(tmp_path / "metadata" / "a.parquet", URL=list(map(url, range(25))), TEXT=[f"Ä {i}" for i in range(25)])
    dataset, report = select(tmp_path, samples_per_shard=10)
    assert [len(pq.read_table(dataset.selection(s))) for s in range(3)] == [10, 10, 5]
    assert list(report.outputs) == [f"selection/0000{s}.parquet" for s in range(3)]
    for position, row in enumerate(rows_of(dataset)):
        assert row["uid"] == hashlib.md5(f"{row['url']}\n{row['caption']}".encode()).hexdigest()
        assert row["key"] == compute_key(position % 10, position // 10, 1, 5)
        assert row["key"] == shard_key(position // 10, position % 10, 10)


def test_bytes_depend_neither_on_threads_nor_on_how_rows_are_spread_over_files(tmp_path):
    numbers = list(range(9000))
    texts = [f"caption {i % 4000}" for i in numbers]
    urls = [url(i % 5000) for i in numbers]
    write(tmp_path / "metadata" / "b.parquet", URL=urls[:3000], TEXT=texts[:3000])
    write(tmp_path / "metadata" / "sub" / "a.parquet", url=urls[3000:], caption=texts[3000:])
    write(tmp_path / "turned" / "z.parquet", TEXT=texts[::-1], URL=urls[::-1])
    settings = {"samples_per_shard": 4096}
    _, two = select(tmp_path, "two", num_threads=2, **settings)
    _, one = select(tmp_path, "one", num_threads=1, **settings)
    _, turned = select(tmp_path, "turned_data", metadata=str(tmp_path / "turned"), **settings)
    assert two.outputs == one.outputs == turned.outputs
    assert len(two.outputs) == 3


def test_the_seed_decides_the_order_and_the_limit_takes_the_first(tmp_path):
    write(tmp_path / "metadata" / "a.parquet", URL=list(map(url, range(100))), TEXT=["t"] * 100)
    whole = [row["url"] for row in rows_of(select(tmp_path, "a")[0])]
    limited, report = select(tmp_path, "b", limit=10)
    assert [row["url"] for row in rows_of(limited)] == whole[:10]
    assert report.dropped == {"over_limit": 90}
    other = [row["url"] for row in rows_of(select(tmp_path, "c", seed=7)[0])]
    assert whole != sorted(whole)
    assert other != whole
    assert sorted(other) == sorted(whole)


def test_a_smaller_selection_leaves_no_shard_of_the_larger_one_and_no_temporary_file(tmp_path):
    write(tmp_path / "metadata" / "a.parquet", URL=list(map(url, range(30))), TEXT=["t"] * 30)
    select(tmp_path, samples_per_shard=10)
    dataset, _ = select(tmp_path, samples_per_shard=20)
    assert len(rows_of(dataset)) == 30
    assert [p.name for p in dataset.root.iterdir()] == ["selection"]


def test_the_stage_runs_once_and_again_when_recipe_or_metadata_change(tmp_path):
    file = write(tmp_path / "metadata" / "a.parquet", URL=[url(1)], TEXT=["t"])
    dataset = DatasetDir(tmp_path / "data")
    recipe = Recipe(name="r", select=SelectConfig(metadata=str(tmp_path / "metadata")))
    assert pending(SELECT, dataset, recipe) == [0]
    run_batch(SELECT, dataset, recipe, [0])
    assert pending(SELECT, dataset, recipe) == []
    moved = recipe.select.model_copy(update={"metadata": str(shutil.copytree(tmp_path / "metadata", tmp_path / "m2"))})
    assert pending(SELECT, dataset, recipe.model_copy(update={"select": moved})) == []
    stricter = recipe.select.model_copy(update={"rules": {"min_caption_chars": 1.0}})
    assert pending(SELECT, dataset, recipe.model_copy(update={"select": stricter})) == [0]
    write(file, URL=[url(1), url(2)], TEXT=["t", "t"])
    assert pending(SELECT, dataset, recipe) == [0]


def test_rows_with_equal_shuffle_keys_come_in_the_order_of_their_uids(tmp_path, monkeypatch):
    monkeypatch.setattr("filters.select.shuffle.shuffle_keys", lambda uids, seed: np.zeros(len(uids), np.uint64))
    numbers = [*range(50), *range(20)]
    write(
        tmp_path / "metadata" / "a.parquet", URL=list(map(url, numbers)), TEXT=["t"] * 70, WIDTH=list(range(70, 0, -1))
    )
    dataset, report = select(tmp_path)
    rows = rows_of(dataset)
    assert report.dropped == {"duplicate_row": 20}
    assert [row["uid"] for row in rows] == sorted(row["uid"] for row in rows)
    assert {row["url"]: row["width"] for row in rows} == {url(i): 70 - i - (50 if i < 20 else 0) for i in range(50)}


@pytest.mark.parametrize("rows_per_bucket", [7, 100, 2**16])
def test_the_order_does_not_depend_on_how_much_memory_it_takes(tmp_path, monkeypatch, rows_per_bucket):
    numbers = [*range(1500), *range(300)]
    write(tmp_path / "metadata" / "a.parquet", URL=list(map(url, numbers)), TEXT=["t"] * 1800)
    whole = select(tmp_path, "whole", samples_per_shard=64, limit=1000)[1]
    monkeypatch.setattr("filters.select.stage._ROWS_PER_BUCKET", rows_per_bucket)
    monkeypatch.setattr("filters.select.row_filter._ROWS_AT_ONCE", 500)
    monkeypatch.setattr("filters.select.row_filter._BATCH_ROWS", 100)
    small = select(tmp_path, "small", samples_per_shard=64, limit=1000, num_threads=3)[1]
    assert (small.outputs, small.dropped) == (whole.outputs, whole.dropped)
    assert small.num_out == 1000
    assert sum(small.dropped.values()) == 800


@pytest.mark.parametrize("rows_per_bucket", [7, 2**16])
def test_by_url_the_captions_of_a_url_come_together_and_their_urls_are_shuffled(tmp_path, monkeypatch, rows_per_bucket):
    numbers, captions = [n for n in range(300) for _ in range(4)], [f"caption {n}" for n in range(4)] * 300
    write(tmp_path / "metadata" / "a.parquet", URL=list(map(url, numbers)), TEXT=captions)
    monkeypatch.setattr("filters.select.stage._ROWS_PER_BUCKET", rows_per_bucket)
    dataset, report = select(tmp_path, samples_per_shard=100, shuffle_by="url")
    urls = [row["url"] for row in rows_of(dataset)]
    assert (report.num_out, len(set(urls))) == (1200, 300)
    first = urls[::4]
    assert urls == [url for url in first for _ in range(4)]
    assert sorted(first) != first
    assert first[:20] != [row["url"] for row in rows_of(select(tmp_path, "b", shuffle_by="url", seed=7)[0])][:80:4]
    assert len({row["caption"] for row in rows_of(dataset)[:4]}) == 4


def test_by_url_shards_of_other_bytes_are_made_and_the_digest_of_the_default_is_what_it_was(tmp_path):
    assert _digest(Recipe(name="r"), ["a"]) == "5faf80c38c9ede92dbbf9094c1d3a7a25938ad605687e6e937a453f983b6151c"
    assert _digest(Recipe(name="r", select=SelectConfig(shuffle_by="url")), ["a"]) != _digest(Recipe(name="r"), ["a"])


def test_with_a_limit_only_repeats_that_come_before_it_count_as_repeats(tmp_path):
    write(tmp_path / "metadata" / "a.parquet", URL=[url(i % 10) for i in range(20)], TEXT=["t"] * 20)
    _, report = select(tmp_path, limit=4)
    # The four first uids stand twice each; the fourth's second row comes after the limit was reached.
    assert report.num_out == 4
    assert report.dropped["duplicate_row"] + report.dropped["over_limit"] == 16
    assert report.dropped["duplicate_row"] in (3, 4)


def test_joins_and_lists_work_with_everything_else(tmp_path):
    write(tmp_path / "metadata" / "a.parquet", URL=list(map(url, range(40))), TEXT=["t"] * 40)
    write(
        tmp_path / "scores" / "s.parquet",
        URL=list(map(url, range(30))),
        TEXT=["t"] * 30,
        AESTHETIC_SCORE=[i / 4 for i in range(30)],
    )
    (tmp_path / "block.txt").write_text(f"{url(25)}\n")
    settings = {
        "joins": [{"files": str(tmp_path / "scores"), "by": "url_caption"}],
        "rules": {"min_aesthetic": 5.0},
        "blocklists": [{"files": str(tmp_path / "block.txt"), "by": "url"}],
    }
    dataset, report = select(tmp_path, **settings)
    assert report.dropped == {"aesthetic_missing": 10, "min_aesthetic": 21, "blocklisted": 1}
    assert {row["url"]: row["aesthetic"] for row in rows_of(dataset)} == {
        url(i): i / 4 for i in range(21, 30) if i != 25
    }
    assert any("blocklist" in note for note in report.notes)
    _, again = select(tmp_path, "again", num_threads=1, **settings)
    assert again.outputs == report.outputs


@pytest.mark.skipif(not LAION.exists(), reason="the real LAION rows are not beside this checkout")
def test_real_laion_rows_all_come_through(tmp_path):
    dataset, report = select(tmp_path, metadata=str(LAION), samples_per_shard=1000)
    assert (report.num_in, report.num_out, report.dropped) == (4705, 4705, {})
    found = duckdb.sql(f"SELECT url, caption FROM '{dataset.root}/selection/*.parquet' ORDER BY ALL").fetchall()
    assert found == duckdb.sql(f"SELECT URL, TEXT FROM '{LAION}' ORDER BY ALL").fetchall()


def test_mistakes_in_the_metadata_are_sentences(tmp_path):
    folder = tmp_path / "metadata"
    folder.mkdir()

    def refused(words, **settings):
        with pytest.raises(UserError, match=words):
            select(tmp_path, **settings)

    refused(r"no \.parquet, \.csv, \.tsv, \.jsonl or \.ndjson file in the folder")
    refused("no file or folder", metadata=str(tmp_path / "nowhere-*.parquet"))
    refused("names no metadata", metadata="")
    (folder / "no.parquet").write_text("not Parquet at all")
    refused(r"no\.parquet cannot be read as Parquet")
    (folder / "no.parquet").unlink()
    write(folder / "a.parquet", URL=pa.array([], pa.string()), TEXT=pa.array([], pa.string()))
    refused("has no rows")
    write(folder / "a.parquet", URL=[url(1)], TITLE=["t"])
    refused("a.parquet has no column TEXT or CAPTION. It has: URL, TITLE")
    write(folder / "a.parquet", URL=[url(1)], TEXT=["t"], aesthetic=[9.0])
    refused("has no column ORIGINAL_WIDTH or WIDTH.*rule 'min_side' needs", rules={"min_side": 1})
    refused("first predictor.*never mixed", rules={"min_aesthetic": 5.0})
    write(folder / "a.parquet", URL=[url(1)], TEXT=["t"], WIDTH=[10], HEIGHT=[10])
    refused(r"No row of .* is left \(min_side 1\)", rules={"min_side": 512})


def test_columns_are_found_whatever_their_case_and_release(tmp_path):
    write(tmp_path / "metadata" / "a.parquet", url=[url(1)], Caption=["t"], original_width=[600], original_height=[700])
    write(
        tmp_path / "metadata" / "b.parquet",
        URL=[url(2)], TEXT=["t"], WIDTH=[600.0], HEIGHT=[NAN], hash=[-5], aesthetic_score_laion_v2=[6.5],
    )  # fmt: skip
    dataset, _ = select(tmp_path)
    found = {row["url"]: row for row in rows_of(dataset)}
    assert (found[url(1)]["width"], found[url(1)]["height"], found[url(1)]["aesthetic"]) == (600, 700, None)
    assert (found[url(2)]["width"], found[url(2)]["height"], found[url(2)]["aesthetic"]) == (600, None, 6.5)
    assert found[url(2)]["hash"] == -5
