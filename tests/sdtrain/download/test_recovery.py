"""Failed rows tried again by a build, and what it says of them."""

import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from filters.select.stage import SELECT
from sdtrain import cli
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import entries
from sdtrain.download.retry import RetryCounts, retry_and_count
from sdtrain.download.stage import DOWNLOAD
from tests.sdtrain.download.download_fixtures import prepare, serve_site


@pytest.fixture
def site():
    with serve_site() as site:
        yield site


@pytest.fixture
def build(site, tmp_path, monkeypatch, capsys):
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


def test_build_tries_failed_rows_again_only_when_asked_to(build, site, tmp_path):
    site.status = {"photo/1.jpg": 503, "photo/7.jpg": 503, "photo/4.jpg": 404}
    assert "retry-failed" not in build()
    site.status = {"photo/4.jpg": 404}
    assert "download: finished before, nothing to do" in build()
    assert "retry-failed: 2 of 3 failed rows recovered" in build("--retry-failed")
    assert sum(entry.num_out for entry in entries(DatasetDir(tmp_path / "data"), "download")) == 11
    assert site.asked["photo/4.jpg"] == 1


def test_on_a_new_dataset_nothing_is_tried_twice(build, site):
    site.status = {"photo/1.jpg": 503}
    assert "retry-failed: no row has failed" in build("--retry-failed")
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
