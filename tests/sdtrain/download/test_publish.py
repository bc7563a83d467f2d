"""What is published is whole, and what was published is found again."""

import json
import shutil
import sys
import textwrap

import pytest

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import read_entry
from sdtrain.download.image_shards import read_shard_table
from sdtrain.download.publish import final_files, publish_images, reuse_images
from sdtrain.download.stage import DOWNLOAD, selected_keys
from sdtrain.errors import UserError
from tests.sdtrain.download.download_fixtures import Build, closed_port, prepare, serve_site


@pytest.fixture(scope="module")
def site():
    with serve_site() as site:
        yield site


@pytest.fixture(scope="module")
def finished(site, tmp_path_factory):
    """Two finished shards, a photo in each missing; and two of other images, with all photos of the first."""
    urls = site.serve_photos(12)
    urls[3], urls[9] = site.url("missing/3"), site.url("missing/9")
    build = prepare(tmp_path_factory.mktemp("finished"), urls, per_shard=6)
    build.run()
    site.bodies["missing/3"] = site.bodies["photo/3.jpg"]
    better = prepare(tmp_path_factory.mktemp("better"), urls, per_shard=6)
    better.run()
    del site.bodies["missing/3"]
    return build, better


@pytest.fixture
def build(finished, tmp_path):
    """A copy of the first."""
    root = shutil.copytree(finished[0].dataset.root, tmp_path / "data")
    return Build(DatasetDir(root), finished[0].recipe)


def fingerprint_of(build, shard=0):
    return DOWNLOAD.fingerprint(build.dataset, build.recipe, shard)


def adopt(build):
    """What the build makes of shard 0 when its entry is gone."""
    return reuse_images(build.dataset, 0, selected_keys(build.dataset, 0), fingerprint_of(build))


def test_a_shard_published_but_not_recorded_is_adopted_without_fetching(build, site):
    before = {shard: read_entry(build.dataset, "download", shard) for shard in (0, 1)}
    for shard in (0, 1):
        build.dataset.manifest_entry("download", shard).unlink()
    asked = site.asked.total()
    reports = build.run()
    assert site.asked.total() == asked
    assert len(reports) == 2
    for report in reports:
        times = before[report.shard].model_dump(include={"seconds", "finished_at"})
        assert report.model_copy(update=times) == before[report.shard]


def damage_tar(build):
    content = bytearray(build.dataset.images_tar(0).read_bytes())
    content[600] ^= 1
    build.dataset.images_tar(0).write_bytes(content)


def cut_table(build):
    content = build.dataset.images_table(0).read_bytes()
    build.dataset.images_table(0).write_bytes(content[: len(content) // 2])


def take_other_table(build):
    build.dataset.images_table(1).replace(build.dataset.images_table(0))


DAMAGES = {
    "tar": damage_tar,
    "table": cut_table,
    "other_rows": take_other_table,
    "no_tar": lambda build: build.dataset.images_tar(0).unlink(),
    "no_table": lambda build: build.dataset.images_table(0).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_that_does_not_fit_is_not_adopted(build, damage):
    assert adopt(build) is not None
    DAMAGES[damage](build)
    assert adopt(build) is None


def test_a_shard_of_other_settings_is_not_adopted(build):
    assert adopt(build.with_settings(image_size=47)) is None


def test_a_damaged_shard_is_fetched_again(build):
    expected = build.dataset.images_tar(0).read_bytes()
    damage_tar(build)
    build.run([0])
    assert build.dataset.images_tar(0).read_bytes() == expected


class Killed(BaseException):
    pass


def publish_until(dataset, made, digest, step, monkeypatch):
    """Publishes, and stops at the given change of the file system as if killed there."""
    from sdtrain.download import publish as module

    real, done = module._move, []

    def move(source, target):
        if len(done) == step:
            raise Killed
        done.append(target)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_move", move)
        try:
            publish_images(dataset, 0, made, digest)
        except Killed:
            return False
    return True


@pytest.mark.parametrize("step", range(5))
def test_a_replacement_killed_anywhere_leaves_the_old_pair_or_the_new(build, finished, tmp_path, step, monkeypatch):
    made = final_files(DatasetDir(shutil.copytree(finished[1].dataset.root, tmp_path / "better")), 0)
    old, new = build.dataset.images_tar(0).read_bytes(), made.tar.read_bytes()
    digest = read_shard_table(made.table).tar_sha256
    assert publish_until(build.dataset, made, digest, step, monkeypatch) == (step == 4)
    adopted = adopt(build)
    assert build.dataset.images_tar(0).read_bytes() == (old if step < 2 else new)
    assert adopted.num_out == (5 if step < 2 else 6)
    assert json.loads(build.dataset.images_stats(0).read_bytes())["successes"] == adopted.num_out
    assert not [p for p in (build.dataset.root / "images").iterdir() if p.name.startswith(".")]


def break_children(folder, code, monkeypatch):
    """Makes download processes run `code` at their start; `shards` is `sdtrain.download.image_shards`."""
    folder.mkdir()
    start = "import sys\nif 'sdtrain.download.worker' in sys.orig_argv:\n"
    imported = f"import sdtrain.download.image_shards as shards\n{code}"
    (folder / "sitecustomize.py").write_text(start + textwrap.indent(imported, "    "))
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_lost_rows_are_noticed_and_nothing_is_published(site, tmp_path, monkeypatch):
    forgetful = (
        "real = shards.write_shard\n"
        "def write(shard, rows, *others): return real(shard, rows[:3] + rows[4:], *others)\n"
        "shards.write_shard = write\n"
    )
    break_children(tmp_path / "broken", forgetful, monkeypatch)
    build = prepare(tmp_path / "data", site.serve_photos(6))
    with pytest.raises(UserError, match=r"Samples of shard 00000 were lost: 5 rows where 6 are due.*00000003"):
        build.run()
    assert not (build.dataset.root / "images").exists()
    assert read_entry(build.dataset, "download", 0) is None


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "no-such-host.invalid"])
def test_a_shard_none_of_whose_hosts_can_be_reached_is_a_sentence_and_not_a_record(tmp_path, host):
    start = f"http://{host.format(port=closed_port())}"
    build = prepare(tmp_path, [f"{start}/{n}.jpg" for n in range(20)])
    with pytest.raises(UserError, match=r"Nothing could be reached: of the 20 rows of shard 00000.*Is the network up"):
        build.run()
    assert read_entry(build.dataset, "download", 0) is None
    assert not (build.dataset.root / "images").exists()


def test_a_few_hosts_that_cannot_be_reached_are_rows_like_others(tmp_path, site):
    port = closed_port()
    few = prepare(tmp_path / "few", [f"http://127.0.0.1:{port}/{n}.jpg" for n in range(19)])
    assert few.run()[0].dropped == {"connection_failed": 19}
    urls = [f"http://127.0.0.1:{port}/{n}.jpg" for n in range(30)] + [site.url("gone")]
    mixed = prepare(tmp_path / "mixed", urls)
    assert mixed.run()[0].dropped == {"connection_failed": 30, "http_404": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_a_full_disk_is_a_sentence_and_leaves_no_half_shard(site, tmp_path, monkeypatch):
    on_a_full_disk = (
        "def full(self, content):\n"
        "    with open('/dev/full', 'wb') as file: file.write(content)\n"
        "shards.TemporaryBlobFile.add = full\n"
    )
    break_children(tmp_path / "broken", on_a_full_disk, monkeypatch)
    build = prepare(tmp_path / "data", site.serve_photos(6))
    with pytest.raises(UserError, match="The disk is full"):
        build.run()
    assert sorted(p.name for p in build.dataset.root.iterdir()) == ["manifest", "selection"]
