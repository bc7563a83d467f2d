"""A shard whose selection has changed keeps the outcomes that it has, and fetches the rest."""

import hashlib
import json
import shutil
from collections import Counter
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, selection, write_entry
from sdtrain.dataset.removal_ledger import LEDGER, key_digest, write_ledger
from sdtrain.dataset.stage import pending
from sdtrain.download import publish
from sdtrain.download.publish import drop_images
from sdtrain.download.stage import DOWNLOAD
from tests.sdtrain.download.download_fixtures import Build, prepare, serve_site
from tests.sdtrain.download.test_retry import build_command  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def online():
    with serve_site() as site:
        site.serve_photos(8)
        yield site


@pytest.fixture
def site(online):
    online.asked, online.status = Counter(), {}
    return online


@pytest.fixture(scope="module")
def finished(online, tmp_path_factory):
    """A shard of five rows, of which that of photo 3 failed."""
    online.status = {"photo/3.jpg": 404}
    build = prepare(tmp_path_factory.mktemp("finished"), [online.url(f"photo/{n}.jpg") for n in range(5)])
    build.run()
    return build


@pytest.fixture
def build(finished, site, tmp_path):
    return Build(DatasetDir(shutil.copytree(finished.dataset.root, tmp_path / "data")), finished.recipe)


def select(build, site, numbers, digests=None):
    """Changes the selection to these photos, whose uids name them; `digests` are of some."""
    urls = [site.url(f"photo/{n}.jpg") for n in numbers]
    rows = [{"uid": f"uid-{n}", "caption": f"a cäption {n}"} | (digests or {}).get(n, {}) for n in numbers]
    prepare(build.dataset.root, urls, rows=rows)
    assert pending(DOWNLOAD, build.dataset, build.recipe) == [0]


def run_and_compare(build, site, folder, again=()):
    """Runs the build; it asks only for these photos, and gives what a build of the selection alone would give."""
    build.run()
    assert site.asked == {f"photo/{n}.jpg": 1 for n in again}
    fresh = Build(DatasetDir(folder), build.recipe)
    shutil.copytree(build.dataset.root / "selection", folder / "selection")
    write_entry(fresh.dataset, selection(build.dataset))
    site.status = {"photo/3.jpg": 404}
    fresh.run()
    for files in (fresh.dataset, build.dataset):
        assert not [path for path in (files.root / "images").iterdir() if path.name.startswith(".")]
    for path in ("images/00000.tar", "images/00000.parquet"):
        assert (build.dataset.root / path).read_bytes() == (fresh.dataset.root / path).read_bytes()
    stats = [json.loads(files.images_stats(0).read_bytes()) for files in (build.dataset, fresh.dataset)]
    assert stats[0]["status_dict"] == stats[1]["status_dict"]
    assert stats[0]["selection_sha256"] == hashlib.sha256(build.dataset.selection(0).read_bytes()).hexdigest()


CHANGES = {
    "grown": ([0, 1, 2, 3, 4, 5, 6], [5, 6]),
    "fewer": ([0, 1, 3], []),
    "moved": ([6, 4, 3, 1, 0], [6]),
    "others": ([5, 6, 7], [5, 6, 7]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_new_rows_are_fetched(build, site, tmp_path, change):
    numbers, new = CHANGES[change]
    select(build, site, numbers)
    run_and_compare(build, site, tmp_path / "fresh", new)


def test_a_new_row_of_a_url_that_an_earlier_row_named_fetches_nothing(build, site, tmp_path):
    """Another caption is another sample: of an image that is here, of one that failed, of one that is new."""
    numbers = [0, 0, 1, 3, 3, 5, 5]
    rows = [{"uid": f"other-{at}", "caption": f"another cäption {at}", "width": 96 + at} for at in range(len(numbers))]
    prepare(
        build.dataset.root, [site.url(f"photo/{n}.jpg") for n in numbers], rows=[*rows[:2], {"uid": "uid-1"}, *rows[3:]]
    )
    run_and_compare(build, site, tmp_path / "fresh", [5])
    assert [row["uid"] for row in build.rows()] == ["other-0", "other-1", "uid-1", *(f"other-{n}" for n in range(3, 7))]
    assert [row["reason"] for row in build.rows()] == [None] * 3 + ["http_404"] * 2 + [None] * 2


def test_a_new_row_with_digests_that_cannot_be_compared_is_fetched(build, site, tmp_path):
    select(build, site, range(5), {0: {"uid": "other", "md5": digests_of(site, 0)["md5"]}, 1: {"uid": "another"}})
    run_and_compare(build, site, tmp_path / "fresh", [0])


def test_a_selection_that_grows_twice_fetches_each_url_once(build, site, tmp_path):
    select(build, site, range(6))
    build.run()
    select(build, site, range(8))
    build.run()
    assert site.asked == {"photo/5.jpg": 1, "photo/6.jpg": 1, "photo/7.jpg": 1}
    assert [row["reason"] for row in build.rows()] == [None] * 3 + ["http_404"] + [None] * 4


def damage_tar(dataset):
    content = bytearray(dataset.images_tar(0).read_bytes())
    content[700] ^= 1
    dataset.images_tar(0).write_bytes(content)


def change_stats(dataset, digest):
    path = dataset.images_stats(0)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"selection_sha256": digest}))


def forget_digest(dataset):
    """As earlier versions wrote them."""
    path = dataset.images_stats(0)
    stats = json.loads(path.read_bytes())
    del stats["selection_sha256"]
    path.write_text(json.dumps(stats))


LOSSES = {
    "tar": damage_tar,
    "no tar": lambda dataset: dataset.images_tar(0).unlink(),
    "table": lambda dataset: dataset.images_table(0).write_bytes(dataset.images_table(0).read_bytes()[:900]),
    "table and statistics": lambda dataset: [
        dataset.images_table(0).unlink(),
        dataset.images_stats(0).write_bytes(b"{"),
    ],
    "statistics": lambda dataset: dataset.images_stats(0).unlink(),
    "earlier version": forget_digest,
    "other selection": lambda dataset: change_stats(dataset, "0" * 64),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_an_earlier_shard_that_cannot_be_trusted_is_fetched_again(build, site, tmp_path, loss):
    LOSSES[loss](build.dataset)
    select(build, site, range(6))
    site.status = {"photo/3.jpg": 404}
    run_and_compare(build, site, tmp_path / "fresh", range(6))


def test_with_other_settings_all_rows_are_fetched(build, site, tmp_path):
    select(build, site, range(6))
    site.status = {"photo/3.jpg": 404}
    run_and_compare(build.with_settings(image_size=40), site, tmp_path / "fresh", range(6))


def digests_of(site, number):
    body = site.bodies[f"photo/{number}.jpg"]
    return {"md5": hashlib.md5(body).hexdigest(), "sha256": hashlib.sha256(body).hexdigest()}


def test_images_are_compared_with_digests_that_the_metadata_has_now(build, site, tmp_path):
    digests = {0: digests_of(site, 0), 1: {"sha256": digests_of(site, 1)["sha256"]}, 2: {"sha256": "0" * 64}}
    select(build, site, range(6), digests | {4: {"md5": "no digest"}})
    # Not known of photo 0: what was fetched was scaled down, and no md5 of it recorded.
    run_and_compare(build, site, tmp_path / "fresh", [0, 2, 5])
    assert [row["reason"] for row in build.rows()] == [None, None, "hash_mismatch", "http_404", None, None]
    site.asked.clear()
    select(build, site, range(6))
    run_and_compare(build, site, tmp_path / "again", [2])
    assert build.rows()[2]["reason"] is None


def test_an_md5_is_compared_with_images_stored_as_they_were_fetched(site, tmp_path):
    build = prepare(tmp_path / "data", [site.url(f"photo/{n}.jpg") for n in range(2)], image_size=512)
    build.run()
    site.asked.clear()
    select(build, site, range(2), {0: {"md5": digests_of(site, 0)["md5"]}, 1: {"md5": "0" * 32}})
    run_and_compare(build, site, tmp_path / "fresh", [1])
    assert [row["reason"] for row in build.rows()] == [None, "hash_mismatch"]


def test_without_verification_digests_do_not_matter(build, site, tmp_path):
    build = build.with_settings(verify_hashes=False)
    select(build, site, range(2))
    build.run()
    site.asked.clear()
    select(build, site, range(3), {0: {"sha256": "0" * 64}})
    run_and_compare(build, site, tmp_path / "fresh", [2])


def test_sizes_in_the_metadata_are_compared_again(build, site, tmp_path):
    select(build, site, range(5), {0: {"width": 96, "height": 64}, 1: {"width": 64, "height": 96}})
    run_and_compare(build, site, tmp_path / "fresh")
    assert [row["size_in_metadata"] for row in build.rows()] == ["same", "swapped", None, None, None]


def test_an_image_with_removed_bytes_does_not_come_back(build, site):
    row = {"kind": "sha256", "digest": key_digest("sha256", digests_of(site, 1)["sha256"])}
    row["removed_at"] = datetime.now(UTC)
    write_ledger(build.dataset.removed, pa.Table.from_pylist([row], LEDGER))
    select(build, site, range(3))
    build.run()
    assert [row["reason"] for row in build.rows()] == [None, "removed", None]


def test_a_shard_that_lost_removed_samples_is_used_again(build, site, tmp_path):
    keep = [row for row in pq.read_table(build.dataset.selection(0)).to_pylist() if row["uid"] != "uid-1"]
    schema = pq.read_schema(build.dataset.selection(0))
    pq.write_table(pa.Table.from_pylist(keep, schema), build.dataset.selection(0))
    entry = selection(build.dataset)
    outputs = describe_outputs(build.dataset, [build.dataset.selection(0)])
    write_entry(build.dataset, entry.model_copy(update={"num_in": 4, "num_out": 4, "outputs": outputs}))
    drop_images(build.dataset, 0, ["uid-1"], DOWNLOAD.fingerprint(build.dataset, build.recipe, 0))
    select(build, site, [0, 2, 3, 4, 5])
    run_and_compare(build, site, tmp_path / "fresh", [5])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", range(4))
def test_a_run_killed_while_it_publishes_fetches_nothing_twice(build, site, tmp_path, step, monkeypatch):
    select(build, site, range(6))
    moves, move = iter(range(4)), publish._move

    def until_killed(source, target):
        if next(moves) == step:
            raise Killed
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(publish, "_move", until_killed)
        with pytest.raises(Killed):
            build.run()
    assert site.asked == {"photo/5.jpg": 1}
    site.asked.clear()
    # The new row's image is lost with the temporary files, unless its tar is in place.
    run_and_compare(build, site, tmp_path / "fresh", [5] if step < 2 else [])


def test_statistics_taken_away_by_a_killed_run_come_back(build, site):
    before = json.loads(build.dataset.images_stats(0).read_bytes())
    build.dataset.images_stats(0).replace(build.dataset.images_stats(0).with_name(".00000_stats.json.former"))
    publish.recover_images(build.dataset, 0)
    assert json.loads(build.dataset.images_stats(0).read_bytes()) == before


def test_a_raised_limit_fetches_only_what_it_adds(build_command, site, tmp_path):  # noqa: F811
    build_command("--limit", "6")
    assert len(site.asked) == 6
    before = {row["uid"] for row in Build(DatasetDir(tmp_path / "data"), None).rows()}
    build_command("--limit", "11")
    after = {row["uid"] for row in Build(DatasetDir(tmp_path / "data"), None).rows()}
    assert before < after
    assert (len(site.asked), site.asked.total()) == (11, 11)
