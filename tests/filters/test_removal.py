"""What is removed is in no file any more and does not come back; all else stays as it was."""

import shutil
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from removal_fixtures import (
    ALIKE,
    MISSING,
    NUM_ROWS,
    SAME_BYTES,
    build,
    caption_of,
    files_with,
    make_photo,
    make_recipe,
    members_of,
    rows_of,
    serve,
    uid_of,
    url_of,
    write_metadata,
    write_photos,
)

from filters.finish import finish_dataset
from filters.funnel import funnel
from filters.record import read_recipe
from filters.removal import find_removal
from filters.take_out import finish_removal, start_removal
from sdtrain.data.dataset import DatasetDir
from sdtrain.data.latent_store import LatentStore
from sdtrain.data.manifest import entries, is_whole
from sdtrain.errors import UserError


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(folder of the web server's files, port)."""
    folder = tmp_path_factory.mktemp("site") / "www"
    write_photos(folder)
    with serve(folder) as port:
        yield folder, port


@pytest.fixture(scope="module")
def built(site, tmp_path_factory):
    """A dataset with all of its stages finished."""
    folder = tmp_path_factory.mktemp("built")
    recipe = make_recipe(write_metadata(folder / "metadata" / "a.parquet", site[1], range(NUM_ROWS)))
    dataset = DatasetDir(folder / "data")
    build(dataset, recipe)
    return dataset


@pytest.fixture
def dataset(built, tmp_path):
    """A copy of it, with metadata of its own."""
    root = shutil.copytree(built.root, tmp_path / "data")
    metadata = shutil.copytree(built.root.parent / "metadata", tmp_path / "metadata")
    text = (root / "recipe.yaml").read_text().replace(str(built.root.parent / "metadata"), str(metadata))
    (root / "recipe.yaml").write_text(text.replace("/metadata/a.parquet", "/metadata"))
    return DatasetDir(root)


def remove(dataset: DatasetDir, by: str, entries: list[object], radius: int | None = None):
    path = dataset.root.parent / f"{by}.txt"
    path.write_text("# a list\n" + "".join(f"{entry}\n" for entry in entries))
    removal = find_removal(dataset, path, by, radius)
    start_removal(dataset, removal)
    finish_removal(dataset)
    return removal


def fates(dataset: DatasetDir, port: int) -> dict[int, str | None]:
    numbers = {uid_of(n, port): n for n in range(2 * NUM_ROWS)}
    return {numbers[row["uid"]]: row["reason"] for row in pq.read_table(dataset.decisions).to_pylist()}


def column(dataset: DatasetDir, number: int, port: int, name: str) -> object:
    query = f"SELECT {name} FROM read_parquet(?) WHERE uid = ?"
    return duckdb.execute(query, [f"{dataset.root}/images/*.parquet", uid_of(number, port)]).fetchall()[0][0]


def entries_for(dataset, port, by, numbers):
    if by == "host":
        return ["127.0.0.2"]
    known = {"uid": lambda n: uid_of(n, port), "url": lambda n: url_of(n, port)}
    return [known.get(by, lambda n: column(dataset, n, port, by))(n) for n in numbers]


def check_gone(before, dataset, port, gone):
    """No trace of `gone`, and all else as it was `before`."""
    uids = {uid_of(n, port) for n in gone}
    assert files_with(dataset.root, [w for n in gone for w in (uid_of(n, port), url_of(n, port), caption_of(n))]) == []
    rows, members = before
    keys = {row["key"] for name, row in rows.items() if name.startswith("selection/") and row["uid"] in uids}
    left = {name: row for name, row in rows.items() if name.partition("/")[2] not in uids}
    found = rows_of(dataset)
    # A group of copies may have lost a member; one that has a single one left is none.
    assert {n: r for n, r in found.items() if "duplicates/" not in n} == {
        n: r for n, r in left.items() if "duplicates/" not in n
    }
    names = {name for name in members if name.partition("/")[2].partition(".")[0] not in keys}
    assert members_of(dataset) == {name: members[name] for name in names}
    assert len(names) == len(members) - len(set(members) - names) < len(members)


def check_consistent(dataset, num_removed):
    recipe = read_recipe(dataset)
    rows = funnel(dataset, recipe)  # which says so if counts do not add up
    assert {row["reason"]: row["dropped"] for row in rows}.get("removed") == num_removed
    assert rows[-1]["remaining"] == sum(entry.num_out for entry in entries(dataset, "pack"))
    for stage in ("select", "download", "score", "dedup", "keep", "pack", "encode"):
        for entry in entries(dataset, stage):
            assert is_whole(dataset, entry)
    assert [(e.num_in, e.dropped) for e in entries(dataset, "remove")] == [(num_removed, {"removed": num_removed})]
    assert build(dataset, recipe) == []


@pytest.mark.parametrize("by", ["uid", "url", "sha256", "host", "phash"])
def test_whatever_a_list_goes_by_no_trace_is_left_and_all_else_is_as_it_was(dataset, site, by):
    listed = [n for n in range(NUM_ROWS) if n % 4 == 0] if by == "host" else [2, 9, 25]
    gone = {*listed, *(copy for copy, of in SAME_BYTES.items() if of in listed or copy in listed)}
    gone |= {SAME_BYTES[copy] for copy in gone if copy in SAME_BYTES}
    before = rows_of(dataset), members_of(dataset)
    remove(dataset, by, entries_for(dataset, site[1], by, listed))
    check_gone(before, dataset, site[1], gone)
    check_consistent(dataset, len(gone))


def test_the_report_its_pictures_and_the_views_show_nothing_of_it(dataset, site):
    finish_dataset(dataset, read_recipe(dataset))
    kept = sorted(n for n, reason in fates(dataset, site[1]).items() if reason is None)
    shown = [n for n in kept if files_with(dataset.root / "pictures", [f"{key_of(dataset, n, site[1])}.jpg"])]
    assert dataset.report.exists()
    remove(dataset, "uid", [uid_of(n, site[1]) for n in shown])
    words = [w for n in shown for w in (uid_of(n, site[1]), url_of(n, site[1]), caption_of(n))]
    assert len(shown) > 5
    assert files_with(dataset.root, words) == []
    assert {p.name for p in (dataset.root / "pictures").iterdir()} >= {"funnel.png"}
    with duckdb.connect(str(dataset.database), read_only=True) as connection:
        assert connection.execute("SELECT dropped FROM funnel WHERE reason = 'removed'").fetchall()[0][0] >= len(shown)


def key_of(dataset, number, port):
    return column(dataset, number, port, "key")


def test_rows_without_a_picture_go_too(dataset, site):
    before = rows_of(dataset), members_of(dataset)
    remove(dataset, "uid", [uid_of(n, site[1]) for n in (MISSING[0], 10)])
    check_gone(before, dataset, site[1], {MISSING[0], 10})
    check_consistent(dataset, 2)


def test_with_a_radius_what_looks_alike_goes_too_and_without_it_stays(dataset, site):
    (copy, original), port = next(iter(ALIKE.items())), site[1]
    list_of = dataset.root.parent / "list.txt"
    list_of.write_text(uid_of(original, port))
    assert find_removal(dataset, list_of, "uid").num_samples == 1
    found = find_removal(dataset, list_of, "uid", radius=4)
    assert (found.num_listed, found.num_alike) == (1, 1)
    before = rows_of(dataset), members_of(dataset)
    remove(dataset, "uid", [uid_of(original, port)], radius=4)
    check_gone(before, dataset, port, {original, copy})
    check_consistent(dataset, 2)


def test_a_dry_run_writes_nothing(dataset, site, digests):
    before = digests(dataset)
    path = dataset.root.parent / "list.txt"
    path.write_text(f"{uid_of(1, site[1])}\n{'0' * 32}\n")
    found = find_removal(dataset, path, "uid")
    assert found.sentences()[0] == "2 entries by uid: 1 samples"
    assert digests(dataset) == before
    assert found.touched["select"] == found.touched["download"] != []


def test_shards_that_held_none_of_it_are_not_touched(dataset, site):
    def stamps():
        paths = [
            p for folder in ("selection", "images", "dataset", "latents") for p in (dataset.root / folder).iterdir()
        ]
        return {dataset.relative(p): p.stat().st_ino for p in paths if p.suffix in (".tar", ".parquet")}

    before = stamps()
    removal = remove(dataset, "uid", [uid_of(2, site[1])])
    changed = {name for name, inode in stamps().items() if before[name] != inode}
    stages = {"select": ["selection", "parquet"], "download": ["images", "parquet", "tar"]}
    stages |= {"pack": ["dataset", "parquet", "tar"], "encode": ["latents", "parquet", "tar"]}
    expected = {
        f"{f}/{s:05d}.{x}" for stage, (f, *kinds) in stages.items() for s in removal.touched[stage] for x in kinds
    }
    assert changed == expected
    assert all(len(shards) == 1 for stage, shards in removal.touched.items() if stage != "dedup")


def test_a_packed_shard_that_is_lost_later_is_made_again_as_it_was(dataset, site):
    remove(dataset, "uid", [uid_of(n, site[1]) for n in (2, 9, 25, 30)])
    recipe = read_recipe(dataset)
    before = {path: path.read_bytes() for path in sorted((dataset.root / "dataset").iterdir())}
    for shard in range(len(entries(dataset, "pack"))):
        dataset.packed_tar(shard).unlink()
        dataset.packed_table(shard).unlink()
        assert {(r.stage, r.shard) for r in build(dataset, recipe)} == {("pack", shard)}
    assert {path: path.read_bytes() for path in sorted((dataset.root / "dataset").iterdir())} == before


def test_an_image_shard_that_is_lost_later_is_fetched_without_it(dataset, site):
    (touched,) = remove(dataset, "url", [url_of(2, site[1])]).touched["download"]
    dataset.images_tar(touched).unlink()
    before = rows_of(dataset)
    build(dataset, read_recipe(dataset))
    assert rows_of(dataset) == before
    assert 2 not in fates(dataset, site[1])


def test_what_comes_again_is_blocked_by_url_by_bytes_and_by_looks(dataset, site):
    folder, port = site
    remove(dataset, "uid", [uid_of(n, port) for n in (2, 6)], radius=4)
    shutil.copy(folder / "2.jpg", folder / "41.jpg")
    (folder / "42.jpg").write_bytes(make_photo(6, quality=75))
    write_metadata(dataset.root.parent / "metadata" / "b.parquet", port, [2, 6, 41, 42])
    build(dataset, read_recipe(dataset))
    rows = funnel(dataset, read_recipe(dataset))
    assert [(r["stage"], r["dropped"]) for r in rows if r["reason"] == "removed"] == [
        ("select", 3 + 2),
        ("download", 1),
        ("keep", 1),
    ]
    assert {n: r for n, r in fates(dataset, port).items() if n > NUM_ROWS} == {41: "removed", 42: "removed"}
    assert files_with(dataset.root / "selection", [uid_of(2, port), uid_of(6, port)]) == []


@pytest.mark.parametrize("by", ["url", "host"])
def test_a_new_selection_of_everything_leaves_it_out(dataset, site, by):
    gone = {n for n in range(NUM_ROWS) if n % 4 == 0} | {20, 21} - {21} if by == "host" else {2}
    remove(dataset, by, entries_for(dataset, site[1], by, sorted(gone)))
    recipe = read_recipe(dataset)
    recipe = recipe.model_copy(update={"select": recipe.select.model_copy(update={"seed": 7})})
    build(dataset, recipe)
    assert not gone & fates(dataset, site[1]).keys()
    assert {r["reason"]: r["dropped"] for r in funnel(dataset, recipe)}["removed"] >= len(gone)


def test_whole_shards_may_go_and_the_dataset_can_still_grow(dataset, site):
    port = site[1]
    first = pq.read_table(dataset.selection(0))["url"].to_pylist()
    packed = pq.read_table(dataset.packed_table(1))["uid"].to_pylist()
    uids = [uid_of(n, port) for n in range(NUM_ROWS) if url_of(n, port) in first] + packed
    num = find_removal_of(dataset, uids).num_samples
    remove(dataset, "uid", uids)
    check_consistent(dataset, num)
    assert len(pq.read_table(dataset.selection(0))) == 0
    assert len(LatentStore(dataset.root, 32)) == sum(entry.num_out for entry in entries(dataset, "encode"))
    for path in (dataset.images_tar(0), dataset.images_table(0)):
        path.unlink()
    write_metadata(dataset.root.parent / "metadata" / "b.parquet", port, [*range(NUM_ROWS, NUM_ROWS + 3), 5])
    reports = build(dataset, read_recipe(dataset))
    assert ("download", 0, 0) in {(r.stage, r.shard, r.num_in) for r in reports}
    assert {41, 42} <= fates(dataset, port).keys()


def find_removal_of(dataset, uids):
    path = dataset.root.parent / "some.txt"
    path.write_text("\n".join(uids))
    return find_removal(dataset, path, "uid")


def test_latents_and_packed_pictures_lie_where_the_tables_say(dataset, site):
    before = LatentStore(dataset.root, 32)
    moments = dict(zip(before.uids(np.arange(len(before))), before.get(np.arange(len(before))), strict=True))
    remove(dataset, "uid", [uid_of(n, site[1]) for n in (2, 9, 25)])
    after = LatentStore(dataset.root, 32)
    after.check_shards()
    assert len(after) == len(before) - 3
    for uid, found in zip(after.uids(np.arange(len(after))), after.get(np.arange(len(after))), strict=True):
        assert (found == moments[uid]).all()
    for shard in range(len(entries(dataset, "pack"))):
        content = dataset.packed_tar(shard).read_bytes()
        for row in pq.read_table(dataset.packed_table(shard)).to_pylist():
            assert content[row["picture_offset"] :][:3] == b"\xff\xd8\xff"


def test_a_second_list_adds_to_the_first_and_the_same_list_again_changes_nothing(dataset, site, digests):
    port = site[1]
    remove(dataset, "uid", [uid_of(2, port)])
    remove(dataset, "url", [url_of(9, port)])
    assert [e.num_in for e in entries(dataset, "remove")] == [1, 1]
    assert {row["listed_by"] for row in pq.read_table(dataset.removed).to_pylist()} == {"uid", "url", None}
    again = find_removal_of(dataset, [uid_of(2, port)])
    assert not again.has_effect
    assert again.sentences()[-1] == "All of it is blocked already."


def test_parquet_lists_are_read_and_wrong_ones_are_sentences(dataset, site, tmp_path):
    pq.write_table(pa.table({"URL": [url_of(2, site[1]), None]}), tmp_path / "list.parquet")
    assert find_removal(dataset, tmp_path / "list.parquet", "url").num_samples == 1
    with pytest.raises(UserError, match=r"is no list by host: it has no column host or domain\. It has: URL"):
        find_removal(dataset, tmp_path / "list.parquet", "host")
    with pytest.raises(UserError, match="cannot be read"):
        find_removal(dataset, tmp_path / "none.txt", "uid")
    (tmp_path / "bad.txt").write_text("abc\n")
    with pytest.raises(UserError, match=r"bad.txt, line 1: 'abc' is not a perceptual hash"):
        find_removal(dataset, tmp_path / "bad.txt", "phash")


class Killed(BaseException):
    """What nobody catches."""


@pytest.mark.slow
def test_interrupted_at_any_rename_it_is_finished_by_the_next_build(dataset, site, monkeypatch, tmp_path):
    uids = [uid_of(n, site[1]) for n in (2, 4, 9, 25)]
    whole = DatasetDir(shutil.copytree(dataset.root, tmp_path / "whole"))
    remove(whole, "uid", uids)
    expected, num_steps = contents(whole), 0
    for num_steps in range(1, 200, 5):
        hurt = DatasetDir(shutil.copytree(dataset.root, tmp_path / "hurt"))
        if not interrupted(hurt, uids, num_steps, monkeypatch):
            break
        assert build(hurt, read_recipe(hurt)) == [] or num_steps == 1
        if num_steps > 1:
            assert contents(hurt) == expected
        shutil.rmtree(hurt.root)
    assert num_steps > 30


def contents(dataset: DatasetDir) -> dict[str, bytes]:
    folders = ("selection", "images", "scores", "dataset", "latents")
    paths = [p for folder in folders for p in (dataset.root / folder).iterdir()]
    found = {dataset.relative(p): p.read_bytes() for p in [*paths, dataset.decisions, dataset.duplicates]}
    # Where its statistics were lost, nobody knows when the download began.
    return {name: b"" if name.endswith("_stats.json") else content for name, content in found.items()}


def interrupted(dataset: DatasetDir, uids: list[str], num_steps: int, monkeypatch) -> bool:
    """Removes, and stops before the rename of that number."""
    steps, rename = iter(range(1, 10_000)), Path.replace

    def replace(path: Path, target: Path) -> Path:
        if next(steps) == num_steps:
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        try:
            remove(dataset, "uid", uids)
        except Killed:
            return True
    return False
