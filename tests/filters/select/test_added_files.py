"""Files of metadata that are added give new shards; finished ones stay as they are."""

import pyarrow.parquet as pq
import pytest

from filters.recipe import Recipe
from filters.select.stage import SELECT
from filters.select_config import SelectConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import selected_shards, selection
from sdtrain.dataset.stage import pending, run_batch
from tests.filters.select.metadata_fixtures import rows_of, url, write


@pytest.fixture
def build(tmp_path):
    write(tmp_path / "metadata" / "b.parquet", URL=list(map(url, range(100))), TEXT=["t"] * 100)
    settings = {"metadata": str(tmp_path / "metadata"), "samples_per_shard": 30}

    def run(**changes):
        recipe = Recipe(name="r", select=SelectConfig(**(settings | changes)))
        dataset = DatasetDir(tmp_path / "data")
        return dataset, run_batch(SELECT, dataset, recipe, pending(SELECT, dataset, recipe))

    run()
    return run


def test_their_rows_come_after_the_finished_shards_and_known_rows_do_not_come_again(build, tmp_path):
    dataset, _ = build()
    before = selection(dataset)
    write(tmp_path / "metadata" / "a.parquet", URL=list(map(url, range(50, 160))), TEXT=["t"] * 110)
    _, (added,) = build()
    assert (added.num_in, added.num_out, added.dropped) == (110, 60, {"duplicate_row": 50})
    assert list(added.outputs) == ["selection/00004.parquet", "selection/00005.parquet"]
    after = selection(dataset)
    assert {name: after.outputs[name] for name in before.outputs} == before.outputs
    assert (after.num_in, after.num_out) == (210, 160)
    assert {row["url"] for row in rows_of(dataset)} == set(map(url, range(160)))
    assert build()[1] == []
    assert list(selected_shards(dataset)) == list(range(6))


def test_by_url_known_rows_do_not_come_again_either(build, tmp_path):
    dataset, (first,) = build(shuffle_by="url")
    assert first.shard == 0
    rows = {"URL": list(map(url, [*range(50, 160), *range(160)])), "TEXT": ["t"] * 110 + ["another"] * 160}
    write(tmp_path / "metadata" / "a.parquet", **rows)
    _, (added,) = build(shuffle_by="url")
    assert (added.shard, added.num_in, added.num_out, added.dropped) == (1, 270, 220, {"duplicate_row": 50})
    assert len({row["uid"] for row in rows_of(dataset)}) == 320


def test_the_limit_holds_for_all_together(build, tmp_path):
    dataset, _ = build(limit=110)
    write(tmp_path / "metadata" / "a.parquet", URL=list(map(url, range(100, 150))), TEXT=["t"] * 50)
    _, (added,) = build(limit=110)
    assert (added.num_out, added.dropped) == (10, {"over_limit": 40})
    write(tmp_path / "metadata" / "c.parquet", URL=list(map(url, range(200, 210))), TEXT=["t"] * 10)
    _, (nothing,) = build(limit=110)
    assert (nothing.num_out, nothing.outputs) == (0, {})
    assert selection(dataset).num_out == 110


def test_on_request_everything_is_shuffled_anew(build, tmp_path):
    write(tmp_path / "metadata" / "a.parquet", URL=list(map(url, range(100, 150))), TEXT=["t"] * 50)
    dataset, (report,) = build(new_files="reshuffle")
    assert (report.shard, report.num_out) == (0, 150)
    assert build(new_files="reshuffle")[1] == []
    assert [len(pq.read_table(dataset.selection(shard))) for shard in range(5)] == [30] * 5


def test_a_file_that_is_gone_or_a_changed_rule_makes_one_selection_of_all(build, tmp_path):
    write(tmp_path / "metadata" / "a.parquet", URL=list(map(url, range(100, 150))), TEXT=["t"] * 50)
    dataset, _ = build()
    assert len(list((dataset.root / "manifest" / "select").iterdir())) == 2
    _, (report,) = build(rules={"max_caption_chars": 5})
    assert (report.shard, report.num_out) == (0, 150)
    (tmp_path / "metadata" / "b.parquet").unlink()
    _, (report,) = build(rules={"max_caption_chars": 5})
    assert (report.shard, report.num_out) == (0, 50)
    assert list(selected_shards(dataset)) == [0, 1]
    assert sorted(p.name for p in dataset.selection(0).parent.iterdir()) == ["00000.parquet", "00001.parquet"]


def test_known_rows_do_not_come_again_where_names_are_longer_than_others(build, tmp_path, monkeypatch):
    """As from 100,000 shards on, when the order of the names is not that of the shards; here from 10 on."""
    monkeypatch.setattr(DatasetDir, "selection", lambda self, shard: self.root / "selection" / f"{shard}.parquet")
    monkeypatch.setattr("filters.select.stage._ROWS_PER_BUCKET", 8)
    build(samples_per_shard=5)
    write(tmp_path / "metadata" / "a.parquet", URL=list(map(url, range(160))), TEXT=["t"] * 160)
    dataset, (added,) = build(samples_per_shard=5)
    assert (added.num_out, added.dropped) == (60, {"duplicate_row": 100})
    assert list(selected_shards(dataset)) == list(range(32))
