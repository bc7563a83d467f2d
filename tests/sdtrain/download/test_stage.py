"""Downloads through the child process: every row has its reason, every run gives the same bytes."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdtrain.dataset.files import sweep
from sdtrain.dataset.shard_report import fingerprint
from sdtrain.dataset.stage import pending
from sdtrain.dataset.tars import read_samples
from sdtrain.download.image_shards import TABLE
from sdtrain.download.rows import SCHEMA
from sdtrain.download.shard_job import exif_of
from sdtrain.download.stage import DOWNLOAD
from sdtrain.errors import UserError
from tests.sdtrain.download.download_fixtures import closed_port, encoded, photo, prepare, serve_site
from tests.sdtrain.images.hostile_images import GOOD, HOSTILE


@pytest.fixture(scope="module")
def site():
    with serve_site() as site:
        site.bodies |= {name: body for name, (body, _) in HOSTILE.items()} | GOOD
        yield site


@pytest.fixture(scope="module")
def cases(site, tmp_path_factory):
    """One build over all bodies, done twice into two datasets with different numbers of connections."""
    urls = [site.url(name) for name in [*HOSTILE, *GOOD, "missing", "empty"]]
    site.bodies["empty"] = b""
    urls.append(f"http://127.0.0.1:{closed_port()}/refused")
    rows = [{"width": 96, "height": 64}] * len(urls)
    builds = []
    for name, connections in (("first", 3), ("second", 16)):
        build = prepare(tmp_path_factory.mktemp(name), urls, per_shard=30, rows=rows, connections=connections)
        builds.append((build, build.run()))
    return builds


def test_every_row_has_its_reason_and_the_counts_add_up(cases):
    build, reports = cases[0]
    expected = {name: reason for name, (_, reason) in HOSTILE.items()} | dict.fromkeys(GOOD)
    expected |= {"missing": "http_404", "empty": "empty_body", "refused": "connection_failed"}
    found = {row["url"].rsplit("/", 1)[1]: row["reason"] for row in build.rows()}
    assert found == expected
    assert sum(report.num_in for report in reports) == len(expected)
    assert sum(report.num_out for report in reports) == len(GOOD)
    for row in build.rows():
        assert row["status"] == ("success" if row["reason"] is None else row["status"])
        assert (row["error_message"] or "").startswith(f"{row['reason']}: " if row["reason"] else "")
        assert (row["phash"] is None) == (row["sha256"] is None) == (row["reason"] is not None)


def test_status_tells_fetching_from_making(cases):
    status = {row["reason"]: row["status"] for row in cases[0][0].rows()}
    assert status["http_404"] == status["connection_failed"] == status["empty_body"] == "failed_to_download"
    assert status["not_an_image"] == status["too_many_pixels"] == status["other_format"] == "failed_to_resize"


def test_two_runs_give_the_same_bytes(cases):
    (_, first), (_, second) = cases
    assert [r.outputs for r in sorted(first, key=lambda r: r.shard)] == [
        r.outputs for r in sorted(second, key=lambda r: r.shard)
    ]


def test_selected_rows_keep_key_uid_and_order(cases):
    dataset = cases[0][0].dataset
    names = ["key", "uid", "url", "caption"]
    for shard in range(3):
        selected = pq.read_table(dataset.selection(shard), columns=names)
        assert pq.read_table(dataset.images_table(shard), columns=names).equals(selected)


def test_tables_have_one_row_group_and_img2datasets_columns_and_ours(cases):
    file = pq.ParquetFile(cases[0][0].dataset.images_table(0))
    assert file.schema_arrow.remove_metadata() == TABLE
    assert file.num_row_groups == 1
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


def test_tars_hold_image_caption_and_row_of_every_success_in_the_order_of_keys(cases):
    build, _ = cases[0]
    rows = {row["key"]: row for row in build.rows() if row["reason"] is None}
    samples = [sample for shard in range(3) for sample in read_samples(build.dataset.images_tar(shard))]
    assert [key for key, _ in samples] == sorted(rows)
    for key, parts in samples:
        assert set(parts) == {"jpg", "txt", "json"}
        assert parts["txt"].decode() == rows[key]["caption"]
        assert json.loads(parts["json"]) == {name: rows[key][name] for name in SCHEMA.names}
        assert parts["json"] == json.dumps(json.loads(parts["json"]), indent=4).encode()
        assert Image.open(io.BytesIO(parts["jpg"])).size == (rows[key]["width"], rows[key]["height"])
        name = rows[key]["url"].rsplit("/", 1)[1]
        assert rows[key]["sha256"] == hashlib.sha256(GOOD[name]).hexdigest()


def test_statistics_are_img2datasets_and_the_selection(cases):
    build, reports = cases[0]
    for report in reports:
        stats = json.loads(build.dataset.images_stats(report.shard).read_bytes())
        assert list(stats) == [
            *("count", "successes", "failed_to_download", "failed_to_resize", "duration", "start_time", "end_time"),
            "status_dict",
            "selection_sha256",
        ]
        selected = build.dataset.selection(report.shard)
        assert stats["selection_sha256"] == hashlib.sha256(selected.read_bytes()).hexdigest()
        assert stats["count"] == report.num_in == sum(stats["status_dict"].values())
        assert stats["successes"] == report.num_out == stats["status_dict"].get("success", 0)
        assert stats["failed_to_download"] + stats["failed_to_resize"] == sum(report.dropped.values())


def test_the_decoded_size_is_compared_with_the_metadatas(site, tmp_path):
    body = encoded(photo(1, 96, 64))
    site.bodies["sized"] = body
    sizes = [(96, 64), (64, 96), (96, 65), (None, 64), (None, None)]
    rows = [{"width": width, "height": height} for width, height in sizes]
    build = prepare(tmp_path, [site.url("sized")] * 5, rows=rows)
    build.run()
    assert [row["size_in_metadata"] for row in build.rows()] == ["same", "swapped", "other", None, None]


def test_digests_of_the_metadata_are_checked_and_what_is_no_digest_is_passed_over(site, tmp_path):
    body = GOOD["jpeg"]
    md5, sha256 = hashlib.md5(body).hexdigest(), hashlib.sha256(body).hexdigest()
    given = [
        ({}, None), ({"md5": md5}, None), ({"md5": md5.upper(), "sha256": f" {sha256.upper()}\n"}, None),
        ({"md5": "0" * 32}, "hash_mismatch"), ({"sha256": "f" * 64}, "hash_mismatch"),
        ({"md5": md5, "sha256": "0" * 64}, "hash_mismatch"), ({"md5": "0" * 32, "sha256": sha256}, "hash_mismatch"),
        ({"md5": "-7311462340034013184"}, None), ({"md5": "", "sha256": sha256[:40]}, None),
    ]  # fmt: skip
    build = prepare(tmp_path / "on", [site.url("jpeg")] * len(given), rows=[row for row, _ in given])
    build.run()
    assert [row["reason"] for row in build.rows()] == [reason for _, reason in given]
    assert {row["status"] for row in build.rows() if row["reason"]} == {"failed_to_download"}
    build = prepare(tmp_path / "off", [site.url("jpeg")], rows=[{"md5": "0" * 32}], verify_hashes=False)
    assert build.run()[0].num_out == 1


def test_exif_as_long_as_a_file_is_not_kept():
    text = Image.Exif()
    text[270] = "x" * 50_000
    assert len(exif_of(encoded(photo(1), "tiff", exif=text))) > 50_000
    text[270] = "x" * 1_000_000
    assert exif_of(encoded(photo(1), "tiff", exif=text)) is None
    assert exif_of(encoded(photo(1))) == "{}"


def test_nothing_is_left_but_the_outputs(cases):
    root = cases[0][0].dataset.root
    assert sorted(p.name for p in root.iterdir()) == ["images", "manifest", "selection"]
    assert sorted(p.name for p in (root / "images").iterdir()) == [
        f"0000{shard}{end}" for shard in range(3) for end in (".parquet", ".tar", "_stats.json")
    ]


def test_a_second_run_does_nothing_and_only_what_changes_images_redoes_them(site, tmp_path):
    build = prepare(tmp_path, site.serve_photos(6), per_shard=2)
    build.run()
    asked = site.asked.total()
    assert pending_of(build) == []
    how = {"connections": 3, "timeout_s": 9, "contact": "me@example.org", "retries": 1, "requests_per_host_s": 7}
    assert pending_of(build.with_settings(**how)) == []
    assert pending_of(build.with_settings(image_size=32)) == [0, 1, 2]
    assert pending_of(build.with_settings(reencode="always")) == [0, 1, 2]
    assert pending_of(build.with_settings(scaled_decoding=True)) == [0, 1, 2]
    assert site.asked.total() == asked


def test_a_setting_of_a_later_version_does_not_change_the_digest_where_it_is_off(tmp_path):
    build = prepare(tmp_path, ["http://a.example/b.jpg"])
    names = (
        "image_size resize_mode resize_only_if_bigger encode_format encode_quality reencode max_pixels verify_hashes "
    )
    names += "max_bytes max_redirects robots_header robots_txt tdm_reservation allow_private_hosts"
    config = {name: getattr(build.recipe.download, name) for name in names.split()}
    rows = hashlib.sha256(build.dataset.selection(0).read_bytes()).hexdigest()
    expected = fingerprint("download/2", config | {"rows": rows})
    assert DOWNLOAD.fingerprint(build.dataset, build.recipe, 0) == expected


def pending_of(build):
    return pending(DOWNLOAD, build.dataset, build.recipe)


def test_shards_are_published_as_they_finish_and_the_child_ends_with_the_stage(site, tmp_path):
    build = prepare(tmp_path, site.serve_photos(30), per_shard=10, connections=2)
    reports = DOWNLOAD.run(build.dataset, build.recipe, [0, 1, 2])
    first = next(reports).shard
    assert build.dataset.images_tar(first).exists()
    reports.close()
    assert not [p for p in psutil.Process().children() if "sdtrain.download.worker" in " ".join(p.cmdline())]


def test_at_most_connections_requests_are_under_way(site, tmp_path):
    build = prepare(tmp_path, site.serve_photos(40), connections=3, connections_per_host=3)
    site.pause_s = 0.05
    started = time.monotonic()
    build.run()
    site.pause_s = 0
    assert time.monotonic() - started >= 40 / 3 * 0.05


def test_a_child_that_fails_says_why(site, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "cv2.py").write_text("raise ImportError('no OpenCV today')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    build = prepare(tmp_path / "data", site.serve_photos(1))
    with pytest.raises(UserError, match=r"ended with code 1 .*no OpenCV today"):
        build.run()


def test_the_child_dies_with_its_parent_and_its_leftovers_are_swept(site, tmp_path):
    urls = [site.url(f"jpeg?{number}") for number in range(200)]
    build = prepare(tmp_path / "data", urls, requests_per_host_s=5, connections_per_host=1)
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.sdtrain.download.download_fixtures import BuildRecipe, DownloadConfig\n"
        "from sdtrain.download.stage import DOWNLOAD; from sdtrain.dataset.layout import DatasetDir\n"
        "config = DownloadConfig.model_validate_json(sys.argv[2])\n"
        "list(DOWNLOAD.run(DatasetDir(Path(sys.argv[1])), BuildRecipe(config), [0]))\n"
    )
    arguments = [str(build.dataset.root), build.recipe.download.model_dump_json()]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    parent = subprocess.Popen([sys.executable, "-c", program, *arguments], env=environment)
    child = first_child(parent.pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert psutil.wait_procs([child], timeout=10)[1] == []
    assert list(build.dataset.root.glob(".download-*.partial"))
    assert not (build.dataset.root / "images").exists()
    sweep(build.dataset.root)
    assert not list(build.dataset.root.glob(".download-*"))


def first_child(pid):
    for _ in range(200):
        children = psutil.Process(pid).children()
        if children:
            return children[0]
        time.sleep(0.05)
    raise AssertionError("no child process appeared")
