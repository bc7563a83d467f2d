"""Failed rows tried again: alone, and by a build that says what came of them."""

import json
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from filters.select.stage import SELECT
from sdtrain import cli
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import entries, read_entry
from sdtrain.dataset.stage import pending
from sdtrain.dataset.tars import read_samples
from sdtrain.download.retry import RetryCounts, retry_and_count, retry_failed
from sdtrain.download.stage import DOWNLOAD
from tests.sdtrain.download.download_fixtures import Build, closed_port, prepare, serve_site

FAILING = {"photo/1.jpg": 503, "photo/2.jpg": 404, "photo/3.jpg": 429}


@pytest.fixture(scope="module")
def online():
    with serve_site() as site:
        yield site


@pytest.fixture
def site(online):
    online.status, online.asked = {}, Counter()
    return online


@pytest.fixture(scope="module")
def finished(online, tmp_path_factory):
    """Two shards: in the first, rows 1 to 3 failed with 503, 404 and 429, in the second none."""
    online.status = FAILING
    build = prepare(tmp_path_factory.mktemp("finished"), online.serve_photos(12), per_shard=6)
    build.run()
    return build


@pytest.fixture
def build(finished, site, tmp_path):
    root = shutil.copytree(finished.dataset.root, tmp_path / "data")
    site.status = dict(FAILING)
    return Build(DatasetDir(root), finished.recipe)


def reasons(build):
    return {row["url"].rsplit("/", 1)[1]: row["reason"] for row in build.rows() if row["reason"]}


def stamps(build):
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (build.dataset.root / "images").iterdir()}


def test_only_what_may_have_passed_is_fetched_and_put_beside_what_was_there(build, site):
    before = dict(read_samples(build.dataset.images_tar(0)))
    second = stamps(build)["00001.tar"]
    site.status = {"photo/3.jpg": 500}
    reports = retry_failed(build.dataset, build.recipe)
    assert set(site.asked) == {"photo/1.jpg", "photo/3.jpg"}
    assert [(r.shard, r.num_out, r.dropped) for r in reports] == [(0, 4, {"http_404": 1, "http_500": 1})]
    after = dict(read_samples(build.dataset.images_tar(0)))
    assert list(after) == ["00000000", "00000001", "00000004", "00000005"]
    assert {key: after[key] for key in before} == before
    assert stamps(build)["00001.tar"] == second
    assert reasons(build) == {"2.jpg": "http_404", "3.jpg": "http_500"}
    assert read_entry(build.dataset, "download", 0) == reports[0]
    assert pending(DOWNLOAD, build.dataset, build.recipe) == []
    assert json.loads(build.dataset.images_stats(0).read_bytes())["successes"] == 4


def test_the_shard_is_the_one_that_a_good_day_would_have_given(build, site, tmp_path):
    site.status = {}
    retry_failed(build.dataset, build.recipe, reasons=["http_503", "http_404", "http_429"])
    undisturbed = prepare(tmp_path / "undisturbed", [site.url(f"photo/{n}.jpg") for n in range(12)], per_shard=6)
    undisturbed.run()
    for path in ("images/00000.tar", "images/00000.parquet"):
        assert (build.dataset.root / path).read_bytes() == (undisturbed.dataset.root / path).read_bytes()


def test_given_reasons_alone_are_tried(build, site):
    retry_failed(build.dataset, build.recipe, reasons={"http_404", "timeout"})
    assert set(site.asked) == {"photo/2.jpg"}


def test_nothing_to_try_fetches_nothing(build, site):
    assert retry_failed(build.dataset, build.recipe, reasons=["not_an_image"]) == []
    assert not site.asked


def test_shards_of_another_recipe_are_left_to_the_build(build, site):
    assert retry_failed(build.dataset, build.with_settings(image_size=32).recipe) == []
    assert not site.asked


def test_a_shard_whose_hosts_are_still_unreachable_stays_as_it_is(site, tmp_path):
    urls = [*site.serve_photos(3), f"http://127.0.0.1:{closed_port()}/a.jpg"]
    build = prepare(tmp_path, urls)
    build.run()
    before = stamps(build)
    entry = read_entry(build.dataset, "download", 0)
    assert retry_failed(build.dataset, build.recipe) == []
    assert stamps(build) == before
    assert read_entry(build.dataset, "download", 0) == entry


def test_each_changed_shard_is_reported_when_it_is_done(build, site):
    site.status, seen = {}, []
    reports = retry_failed(build.dataset, build.recipe, on_report=seen.append)
    assert seen == reports
    assert len(seen) == 1


@pytest.fixture
def build_command(site, tmp_path, monkeypatch, capsys):
    """`sdtrain build` with the given options, up to the download; returns what it prints."""
    urls = site.serve_photos(12)
    table = {"URL": urls, "TEXT": ["a caption"] * 12, "WIDTH": [96] * 12, "HEIGHT": [64] * 12}
    pq.write_table(pa.table(table), tmp_path / "metadata.parquet")
    recipe = {
        "name": "little",
        "select": {"metadata": str(tmp_path / "metadata.parquet"), "samples_per_shard": 4},
        "download": {"allow_private_hosts": True, "retries": 0, "image_size": 48, "timeout_s": 2},
        "score": {f"{name}_weights": None for name in ("clip", "aesthetic", "safety", "watermark")},
        "encode": {"vae": "demo", "resolution": 64},
    }
    (tmp_path / "little.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr("filters.pipeline.STAGES", (SELECT, DOWNLOAD))
    monkeypatch.setitem(
        sys.modules, "filters.inspect.report", SimpleNamespace(finish_dataset=lambda dataset, recipe: None)
    )

    def run(*options):
        command = ["sdtrain", "build", str(tmp_path / "little.yaml"), "--output", str(tmp_path / "data"), *options]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        return capsys.readouterr().out

    return run


def test_build_tries_failed_rows_again_only_when_asked_to(build_command, site, tmp_path):
    site.status = {"photo/1.jpg": 503, "photo/7.jpg": 503, "photo/4.jpg": 404}
    assert "retry-failed" not in build_command()
    site.status = {"photo/4.jpg": 404}
    assert "download: finished before, nothing to do" in build_command()
    assert "retry-failed: 2 of 3 failed rows recovered" in build_command("--retry-failed")
    assert sum(entry.num_out for entry in entries(DatasetDir(tmp_path / "data"), "download")) == 11
    assert site.asked["photo/4.jpg"] == 1


def test_on_a_new_dataset_nothing_is_tried_twice(build_command, site):
    site.status = {"photo/1.jpg": 503}
    assert "retry-failed: no row has failed" in build_command("--retry-failed")
    assert site.asked["photo/1.jpg"] == 1


def test_counts_are_of_rows_before_and_after(site, tmp_path):
    site.status = {"photo/0.jpg": 503, "photo/1.jpg": 503, "photo/5.jpg": 404}
    small = prepare(tmp_path / "data", site.serve_photos(6), per_shard=3)
    small.run()
    site.status = {"photo/1.jpg": 503}
    found = retry_and_count(small.dataset, small.recipe)
    assert (found.num_failed, found.num_recovered, found.num_shards) == (3, 1, 1)
    assert str(RetryCounts(3000, 1200, 7, 2.04)) == (
        "retry-failed: 1,200 of 3,000 failed rows recovered (7 shards changed), 2.0 s"
    )
