"""A new stage is one declaration and one line: whatever looks at a dataset knows it, and half a declaration fails."""

from dataclasses import replace

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from filters.decide.funnel import funnel
from filters.inspect.prometheus import StatusCollector
from filters.inspect.status import dataset_status
from filters.inspect.views import write_views
from filters.pipeline import STAGES, in_order
from filters.recipe_record import record_recipe
from filters.remove.apply import finish_removal, start_removal
from filters.remove.plan import find_removal
from filters.rules import in_words
from sdtrain.dataset.files import publish
from sdtrain.dataset.manifest import describe_outputs, read_entry
from sdtrain.dataset.rewriting import IN_TABLE
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import NOTHING, Drops, Stage, Table, always_on, nothing_beside, one_shard, pending, run_batch
from tests.filters.dataset_fixtures import make_dataset


def shards(dataset, recipe):
    return [0]


def digest(dataset, recipe, shard):
    return fingerprint("taste/1", None)


def path(dataset, shard):
    return dataset.root / "taste.parquet"


def rules(recipe):
    return {}


def run(dataset, recipe, shards):
    rows = pq.read_table(dataset.latents_table(0), columns=["uid"])
    reasons = ["bland_image", *[None] * (len(rows) - 1)]
    with publish(path(dataset, 0)) as temporary:
        pq.write_table(rows.append_column("reason", pa.array(reasons, pa.string())), temporary)
    outputs, num = describe_outputs(dataset, [path(dataset, 0)]), len(rows)
    dropped = {"bland_image": 1}
    yield ShardReport(stage="taste", shard=0, num_in=num, num_out=num - 1, dropped=dropped, outputs=outputs)


FACTS = {
    "is_on": always_on,
    "inputs": {"encode": "all shards"},
    "planned_by": None,
    "num_shards": one_shard,
    "beside": nothing_beside,
    "table": Table(
        view="tastes", comment="Taste", columns={"uid": "VARCHAR", "reason": "VARCHAR"}, path=path, rewriting=IN_TABLE
    ),
    "drops": Drops(repeats=False, rules=rules, last={}, explain=in_words),
    "uses_gpu": False,
    "needs": NOTHING,
    "work": None,
}
TASTE = Stage("taste", shards, digest, run, **FACTS)


@pytest.fixture
def tasted(tmp_path, monkeypatch):
    monkeypatch.setattr("filters.pipeline.STAGES", in_order(*STAGES, TASTE))
    dataset, recipe = make_dataset(tmp_path)
    record_recipe(dataset, recipe)
    run_batch(TASTE, dataset, recipe, [0])
    return dataset, recipe


def test_status_views_funnel_and_manifest_know_a_new_stage(tasted):
    dataset, recipe = tasted
    last = dataset_status(dataset).stages[-1]
    assert (last.stage, last.num_done, last.num_shards, last.num_in, last.num_out) == ("taste", 1, 1, 27, 26)
    assert pending(TASTE, dataset, recipe) == []
    assert list(funnel(dataset, recipe, (*STAGES, TASTE))[-1].values()) == [
        "taste",
        "bland_image",
        "bland image",
        1,
        26,
    ]
    with duckdb.connect(write_views(dataset, recipe), read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM tastes").fetchone() == (27,)
        assert connection.execute("SELECT num_out FROM stages WHERE stage = 'taste'").fetchone() == (26,)


def test_a_removed_sample_leaves_a_new_stage(tasted, tmp_path):
    dataset, _ = tasted
    uid = pq.read_table(path(dataset, 0))["uid"][1].as_py()
    (tmp_path / "list.txt").write_text(uid + "\n")
    removal = find_removal(dataset, tmp_path / "list.txt", "uid")
    assert removal.touched["taste"] == [0]
    start_removal(dataset, removal)
    finish_removal(dataset)
    assert uid not in pq.read_table(path(dataset, 0))["uid"].to_pylist()
    entry = read_entry(dataset, "taste", 0)
    assert (entry.num_in, entry.num_out, entry.dropped) == (26, 25, {"bland_image": 1})


def test_prometheus_shows_a_new_stage(tasted):
    dataset, _ = tasted
    samples = (sample for metric in StatusCollector([str(dataset.root)]).collect() for sample in metric.samples)
    counted = {sample.name: sample.value for sample in samples if sample.labels.get("stage") == "taste"}
    assert counted["sdtrain_stage_samples_out_total"] == 26


@pytest.mark.parametrize("left_out", FACTS)
def test_a_fact_left_out_fails_at_once(left_out):
    with pytest.raises(TypeError, match=left_out):
        Stage("taste", shards, digest, run, **{name: fact for name, fact in FACTS.items() if name != left_out})


def test_a_pipeline_with_an_unknown_input_or_a_name_twice_fails_at_once():
    with pytest.raises(ValueError, match="reads savour, which is no stage before it"):
        in_order(*STAGES, replace(TASTE, inputs={"savour": "all shards"}))
    with pytest.raises(ValueError, match="two stages have the name 'taste'"):
        in_order(*STAGES, TASTE, replace(TASTE, table=None))


@pytest.mark.parametrize("view", ["tastes", "images", "Hosts", "funnel", "metadata"])
def test_a_view_whose_name_another_has_fails_at_once(view):
    with pytest.raises(ValueError, match=f"two views '{view.lower()}'"):
        in_order(*STAGES, TASTE, replace(TASTE, name="savour", table=replace(TASTE.table, view=view)))
