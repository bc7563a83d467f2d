"""A stage with tables, tars and a column for rules is built, fetched, planned, counted and removed from, unnamed."""

import io
import tarfile
from dataclasses import replace

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from filters.inspect.report import rule_thresholds
from filters.inspect.status import dataset_status
from filters.pipeline import STAGES, in_order
from filters.preflight import local_checks, sized_checks
from filters.recipe_record import read_recipe
from filters.rules import RULES, Rule
from sdtrain.cli import app
from sdtrain.dataset.files import publish, read_parquet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, num_selected_shards, require_entry, selected_shards
from sdtrain.dataset.open import open_to_ask
from sdtrain.dataset.rewriting import in_tar
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import Needs, Stage, Table, always_on, no_openers, nothing_beside, pending
from sdtrain.dataset.sync import fetch_shard_file
from sdtrain.dataset.tars import write_samples
from sdtrain.dataset.work import WORK, Work
from sdtrain.errors import UserError
from sdtrain.model_card.records import dataset_facts
from sdtrain.preflight.checks import findings
from tests.filters.removal_fixtures import NUM_ROWS, make_recipe, write_metadata
from tests.sdtrain.dataset.s3.conftest import server  # noqa: F401 (a fixture)
from tests.sdtrain.dataset.s3.s3_fixtures import BUCKET

MOST = 6


def sourness(uid):
    return int(uid, 16) % 10


def shards(dataset, recipe):
    return list(selected_shards(dataset))


def digest(dataset, recipe, shard):
    return fingerprint("tang/1", None, [require_entry(dataset, "score", shard)])


def path(dataset, shard):
    return dataset.root / "tangs" / f"{shard:05d}.parquet"


def run(dataset, recipe, shards):
    for shard in shards:
        rows = read_parquet(dataset.scores(shard), ["uid", "key", "reason"])
        rows = rows.filter(pc.is_null(rows["reason"])).drop_columns("reason")
        table, tar = path(dataset, shard), path(dataset, shard).with_suffix(".tar")
        with publish(tar) as temporary:
            write_samples(temporary, ((row["key"], {"txt": row["uid"].encode()}) for row in rows.to_pylist()))
        with publish(table) as temporary:
            values = pa.array(map(sourness, rows["uid"].to_pylist()), pa.int32())
            pq.write_table(rows.append_column("sourness", values), temporary)
        outputs, num = describe_outputs(dataset, [tar, table]), len(rows)
        yield ShardReport(stage="tang", shard=shard, num_in=num, num_out=num, outputs=outputs)


def missing_tongue():
    raise UserError("there is no tongue")


TANG = Stage(
    *("tang", shards, digest, run),
    is_on=always_on,
    inputs={"score": "same shard"},
    planned_by=None,
    num_shards=num_selected_shards,
    beside=nothing_beside,
    table=Table(
        view="tangs",
        comment="How sour each image is",
        columns={"uid": "VARCHAR", "key": "VARCHAR", "sourness": "INTEGER", "shard": "INTEGER", "tar": "VARCHAR"},
        path=path,
        rewriting=in_tar(),
    ),
    drops=None,
    uses_gpu=True,
    needs=Needs(files=no_openers, networks=no_openers, sized=no_openers),
    work=Work(num="images", rate="score_images", on="GPUs", writes=("images", "score_row_bytes")),
)
BEFORE = [stage.name for stage in STAGES].index("decide")
RULE = Rule("sourness", "sourness <= ?", "sourer than {value}", stage="tang")


@pytest.fixture(scope="module")
def machine(server, tmp_path_factory):  # noqa: F811
    """Gives this process another, empty work folder; the stage and its rule are declared."""
    from sdtrain.dataset.s3 import mirror, store

    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.setitem(RULES, "max_sourness", RULE)
        patch.setattr("filters.pipeline.STAGES", in_order(*STAGES[:BEFORE], TANG, *STAGES[BEFORE:]))

        def another():
            patch.setenv("SDTRAIN_WORK_DIR", str(tmp_path_factory.mktemp("work")))
            mirror._mirror.cache_clear()
            store._client.cache_clear()

        another()
        yield another
        another()


@pytest.fixture(scope="module")
def built(machine, photo_site, tmp_path_factory):
    """The URL of a dataset that `sdtrain build` made, and its work folder."""
    folder = tmp_path_factory.mktemp("tang")
    metadata = write_metadata(folder / "metadata" / "a.parquet", photo_site[1], range(NUM_ROWS))
    recipe = make_recipe(metadata, decide={"rules": {"max_sourness": MOST}})
    (folder / "tang.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    url = f"s3://{BUCKET}/{folder.name}"
    sdtrain("build", folder / "tang.yaml", "--output", url)
    return url, open_to_ask(url, "the test")


def sdtrain(*arguments):
    done = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.output


def texts(tar):
    with tarfile.open(tar) as file:
        return [file.extractfile(member).read().decode() for member in file]


def test_a_build_runs_it_and_a_rule_drops_by_its_column(built):
    _, dataset = built
    status = {stage.stage: stage for stage in dataset_status(dataset).stages}
    assert status["tang"].num_done == status["tang"].num_shards == status["download"].num_shards
    assert status["tang"].num_in == status["score"].num_out
    reasons = {row["uid"]: row["reason"] for row in pq.read_table(dataset.decisions).to_pylist()}
    sour = {uid for uid, reason in reasons.items() if reason == "max_sourness"}
    assert sour
    measured = {
        uid for shard in shards(dataset, None) for uid in pq.read_table(path(dataset, shard))["uid"].to_pylist()
    }
    assert sour == {uid for uid in measured if sourness(uid) > MOST}
    with duckdb.connect(str(dataset.database), read_only=True) as connection:
        [row] = connection.execute(
            "SELECT stage, meaning, dropped FROM funnel WHERE reason = 'max_sourness'"
        ).fetchall()
        assert row == ("decide", f"sourer than {MOST}", len(sour))
        [threshold] = rule_thresholds(read_recipe(dataset))
        shown = f"SELECT {threshold.expression} FROM selection s WHERE uid = ?"
        assert connection.execute(shown, [min(sour)]).fetchone() == (sourness(min(sour)),)
    assert "max_sourness" in dataset.report.read_text()
    assert all(pending(stage, dataset, read_recipe(dataset)) == [] for stage in (TANG, STAGES[BEFORE]))


def test_its_files_lie_on_s3_and_come_when_they_are_needed(server, machine, built):  # noqa: F811
    url, _ = built
    assert f"{url.rpartition('/')[2]}/tangs/00000.tar" in {
        item["Key"] for item in server.client.list_objects_v2(Bucket=BUCKET, Prefix=url.rpartition("/")[2])["Contents"]
    }
    machine()
    dataset = open_to_ask(url, "the test")
    tar = path(dataset, 0).with_suffix(".tar")
    assert path(dataset, 0).exists()
    assert not tar.exists()
    fetch_shard_file(dataset.root, tar, "tang")
    assert texts(tar) == pq.read_table(path(dataset, 0))["uid"].to_pylist()


def test_the_model_card_counts_its_gpu_hours(built):
    facts = dataset_facts(built[1].root)
    assert facts.gpu_stages == ["encode", "score", "tang"]
    only = facts.model_copy(update={"stage_hours": {"tang": 2.0}})
    assert only.kwh("NVIDIA H200", 1.0) > 10 * only.kwh(None, 1.0)


def test_the_room_on_the_disk_counts_it_or_says_that_it_does_not(machine, tmp_path):
    recipe, dataset = make_recipe(tmp_path / "a.parquet"), DatasetDir(tmp_path)
    stages = [stage for stage in STAGES if stage.is_on(recipe)]
    without = sized_checks(dataset, recipe, 10**6, stages, 1.0)
    counted = sized_checks(dataset, recipe, 10**6, [*stages, TANG], 1.0)
    assert counted[0].open() != without[0].open()
    told = sized_checks(dataset, recipe, 10**6, [*stages, replace(TANG, work=None)], 1.0)[0].open()
    assert told.endswith("; not counted: decide, tang")


def test_a_plan_shows_every_stage_of_the_pipeline():
    assert {stage.name: stage.work for stage in STAGES} == WORK


def test_what_it_needs_is_opened_before_a_build(machine, built, monkeypatch):
    needs = replace(TANG.needs, files=lambda recipe: {"tang.tongue": missing_tongue})
    monkeypatch.setattr("filters.pipeline.STAGES", (*STAGES[:BEFORE], replace(TANG, needs=needs), *STAGES[BEFORE:]))
    found = findings(local_checks(built[1], read_recipe(built[1])))
    assert [(each.name, each.text) for each in found if each.is_problem] == [("tang.tongue", "there is no tongue")]


def test_a_rule_over_a_column_that_no_earlier_stage_has_fails_at_once(machine, monkeypatch):
    with pytest.raises(ValueError, match="no stage before 'decide'"):
        in_order(*STAGES, TANG)
    monkeypatch.setitem(RULES, "max_sourness", replace(RULE, column="sweetness", sql="sweetness <= ?"))
    with pytest.raises(ValueError, match="'max_sourness' looks at 'sweetness' of stage 'tang'"):
        in_order(*STAGES[:BEFORE], TANG, *STAGES[BEFORE:])
    with pytest.raises(ValueError, match="has the name of another"):
        replace(RULE, column="caption")


def test_a_removed_sample_leaves_its_tar_and_its_table(server, machine, built, tmp_path):  # noqa: F811
    url, _ = built
    objects = server.objects(url.rpartition("/")[2])
    gone, *left = pq.read_table(io.BytesIO(objects["tangs/00000.parquet"])).to_pylist()
    (tmp_path / "list.txt").write_text(gone["uid"] + "\n")
    machine()  # another one, which has nothing here
    sdtrain("remove", url, "--list", tmp_path / "list.txt", "--by", "uid")
    dataset = open_to_ask(url, "the test")
    recipe = read_recipe(dataset)
    now = server.objects(url.rpartition("/")[2])
    assert pq.read_table(io.BytesIO(now["tangs/00000.parquet"])).to_pylist() == left
    with tarfile.open(fileobj=io.BytesIO(now["tangs/00000.tar"])) as tar:
        assert tar.getnames() == [f"{row['key']}.txt" for row in left]
    assert now["tangs/00001.tar"] == objects["tangs/00001.tar"]
    assert not [name for name, content in now.items() if name.startswith("tangs/") and gone["uid"].encode() in content]
    entry = require_entry(dataset, "tang", 0)
    assert (entry.num_in, entry.num_out) == (len(left), len(left))
    assert pending(TANG, dataset, recipe) == []
