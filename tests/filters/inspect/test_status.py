"""`sdtrain status` and `sdtrain metrics`, on directories as builds and runs leave them."""

import json
import os
import re
import urllib.request
from pathlib import Path

import duckdb
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from filters.inspect.prometheus import serve_metrics
from filters.inspect.status import dataset_status
from filters.inspect.views import write_views
from filters.recipe import load_recipe
from filters.recipe_record import record_recipe
from sdtrain.cli import app
from sdtrain.config import load_config
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.lock import lock_to_change
from sdtrain.dataset.manifest import write_entry
from sdtrain.dataset.shard_report import Output, ShardReport
from sdtrain.errors import UserError
from sdtrain.training.run_dir import RunDir, run_status

INFRA = Path(__file__).parents[3] / "infra"
NOW = 1_800_000_000


def finish(dataset, stage, shard, num_in, dropped=None, outputs=None, at=NOW):
    report = ShardReport(
        stage=stage,
        shard=shard,
        num_in=num_in,
        num_out=num_in - sum((dropped or {}).values()),
        dropped=dropped or {},
        outputs={name: Output(sha256="0" * 64, bytes=size) for name, size in (outputs or {}).items()},
        seconds=2.0,
        finished_at=at,
    )
    write_entry(dataset, report)


@pytest.fixture
def dataset(tmp_path):
    """Four selected shards of 100, of which three were downloaded, the second 10 s after the first, the third 10 on."""
    made = DatasetDir(tmp_path / "data")
    made.root.mkdir()
    record_recipe(made, load_recipe("demo"))
    finish(made, "select", 0, 500, {"min_side": 100}, {f"selection/{shard:05d}.parquet": 1000 for shard in range(4)})
    for shard in range(3):
        finish(made, "download", shard, 100, {"http_404": 10}, {f"images/{shard:05d}.tar": 5000}, NOW + 10 * shard)
    return made


@pytest.fixture
def run(tmp_path):
    """A run that was killed after step 20."""
    made, config = RunDir(tmp_path / "run"), load_config("tiny")
    made.path.mkdir()
    made.begin(config, 0)
    for step in (10, 20):
        made.log.add(step=step, loss=1 / step, images_per_s=100.0, num_skipped=0)
    (made.path / "heartbeats").mkdir()
    (made.path / "heartbeats" / "rank-00001.json").write_text("{}")
    return made


def test_rate_and_time_left_come_from_when_shards_were_finished(dataset):
    stages = {stage.stage: stage for stage in dataset_status(dataset).stages}
    download = stages["download"]
    assert (download.num_done, download.num_shards) == (3, 4)
    assert download.samples_per_s == 10.0
    assert download.left_s == 10.0
    assert (download.num_in, download.num_out, download.dropped) == (300, 270, {"http_404": 30})
    assert download.num_bytes == 15_000
    assert (stages["score"].num_done, stages["score"].num_shards) == (0, 4)
    assert stages["pack"].num_shards is None, "keep has not decided yet"
    finish(dataset, "decide", 0, 400, {"http_404": 100})
    per_shard = load_recipe("demo").pack.samples_per_shard
    again = {stage.stage: stage for stage in dataset_status(dataset).stages}
    assert again["encode"].num_shards == -(-300 // per_shard)


def test_what_an_earlier_larger_selection_left_is_not_counted(dataset):
    finish(dataset, "select", 0, 500, {"over_limit": 300}, {f"selection/{shard:05d}.parquet": 1000 for shard in (0, 1)})
    download = next(stage for stage in dataset_status(dataset).stages if stage.stage == "download")
    assert (download.num_done, download.num_shards, download.left_s) == (2, 2, 0)
    assert (download.num_in, download.dropped, download.num_bytes) == (200, {"http_404": 20}, 10_000)
    with duckdb.connect(write_views(dataset, load_recipe("demo")), read_only=True) as connection:
        assert connection.execute("SELECT shard FROM stages WHERE stage = 'download'").fetchall() == [(0,), (1,)]


def test_who_is_at_work_is_named_and_not_held_up(dataset):
    assert not dataset_status(dataset).users
    with lock_to_change(dataset, "sdtrain build"):
        assert "sdtrain build is running" in dataset_status(dataset).users[0]
        shown = CliRunner().invoke(app, ["status", str(dataset.root)])
    assert re.search(r"download +3/4 +300 +270 +30", shown.output)
    assert f"process {os.getpid()}" in shown.output


def test_a_run_says_how_far_it_is(run):
    found = run_status(run.path)
    assert (found.step, found.is_done, found.metrics["loss"]) == (20, False, 0.05)
    config = load_config("tiny")
    assert found.left_s == pytest.approx((config.steps - 20) * config.global_batch_size / 100)
    shown = CliRunner().invoke(app, ["status", str(run.path)]).output
    assert f"tiny: step 20 of {config.steps:,}" in shown
    assert "rank 1 was last heard of" in shown
    (run.path / "DONE").write_text(json.dumps({"step": config.steps}))
    assert run_status(run.path).left_s == 0


def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return list(text_string_to_metric_families(answer.read().decode()))


def test_prometheus_gets_what_dashboard_and_alerts_ask_for(dataset, run, tmp_path):
    dataset_status(dataset)
    (tmp_path / "nothing").mkdir()
    port, _ = serve_metrics([str(dataset.root), str(run.path), str(tmp_path / "nothing")], "127.0.0.1", 0)
    families = scrape(port)
    values = {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}
    assert values["sdtrain_stage_shards_done", str(dataset.root), "download"] == 3
    assert values["sdtrain_stage_samples_dropped_total", str(dataset.root), "download", "http_404"] == 30
    assert values["sdtrain_training_step", str(run.path)] == 20
    assert values["sdtrain_up", str(tmp_path / "nothing")] == 0
    finish(dataset, "download", 3, 100)
    again = {(s.name, *sorted(s.labels.values())): s.value for family in scrape(port) for s in family.samples}
    assert again["sdtrain_stage_shards_done", str(dataset.root), "download"] == 4, "it is read anew each time"

    families = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    dashboard = json.loads((INFRA / "grafana" / "sdtrain.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((INFRA / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
    names = {name for text in [*asked, *(rule["expr"] for rule in rules)] for name in re.findall(r"sdtrain_\w+", text)}
    assert len(names) > 15
    assert names <= families
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_a_port_that_is_taken_is_a_sentence(tmp_path):
    port, _ = serve_metrics([], "127.0.0.1", 0)
    with pytest.raises(UserError, match="Choose another --port"):
        serve_metrics([], "127.0.0.1", port)


def test_a_secret_in_a_url_is_refused_before_it_is_served(monkeypatch):
    monkeypatch.setattr("filters.inspect.prometheus.serve_metrics", lambda *_: pytest.fail("it was served"))
    with pytest.raises(UserError, match="bucket and prefix alone") as refused:
        CliRunner().invoke(app, ["metrics", "s3://KEY:s3cr3t@bucket/x"], catch_exceptions=False)
    assert "s3cr3t" not in str(refused.value)
