"""What is removed is in no file any more and does not come back; all else stays as it was."""

import sys

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from filters.inspect.report import finish_dataset
from filters.recipe_record import read_recipe
from filters.remove.plan import find_removal
from sdtrain import cli
from sdtrain.dataset.manifest import entries
from sdtrain.errors import UserError
from sdtrain.loading.latent_store import LatentStore
from tests.filters.removal_fixtures import (
    ALIKE,
    MISSING,
    NUM_ROWS,
    SAME_BYTES,
    caption_of,
    check_consistent,
    column,
    entries_for,
    files_with,
    find_removal_of,
    members_of,
    remove,
    rows_of,
    statuses,
    uid_of,
    url_of,
)


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


@pytest.mark.parametrize("by", ["uid", "url", "sha256", "host", "phash"])
def test_whatever_a_list_goes_by_no_trace_is_left_and_all_else_is_as_it_was(dataset, photo_site, by):
    listed = [n for n in range(NUM_ROWS) if n % 4 == 0] if by == "host" else [2, 9, 25]
    gone = {*listed, *(copy for copy, of in SAME_BYTES.items() if of in listed or copy in listed)}
    gone |= {SAME_BYTES[copy] for copy in gone if copy in SAME_BYTES}
    before = rows_of(dataset), members_of(dataset)
    remove(dataset, by, entries_for(dataset, photo_site[1], by, listed))
    check_gone(before, dataset, photo_site[1], gone)
    check_consistent(dataset, len(gone))


def test_the_report_its_images_and_the_views_show_nothing_of_it(dataset, photo_site):
    finish_dataset(dataset, read_recipe(dataset))
    kept = sorted(n for n, reason in statuses(dataset, photo_site[1]).items() if reason is None)
    shown = [n for n in kept if files_with(dataset.root / "pictures", [f"{key_of(dataset, n, photo_site[1])}.jpg"])]
    assert dataset.report.exists()
    remove(dataset, "uid", [uid_of(n, photo_site[1]) for n in shown])
    words = [w for n in shown for w in (uid_of(n, photo_site[1]), url_of(n, photo_site[1]), caption_of(n))]
    assert len(shown) > 5
    assert files_with(dataset.root, words) == []
    assert {p.name for p in (dataset.root / "pictures").iterdir()} >= {"funnel.png"}
    with duckdb.connect(str(dataset.database), read_only=True) as connection:
        assert connection.execute("SELECT dropped FROM funnel WHERE reason = 'removed'").fetchall()[0][0] >= len(shown)


def key_of(dataset, number, port):
    return column(dataset, number, port, "key")


def test_rows_without_an_image_go_too(dataset, photo_site):
    before = rows_of(dataset), members_of(dataset)
    remove(dataset, "uid", [uid_of(n, photo_site[1]) for n in (MISSING[0], 10)])
    check_gone(before, dataset, photo_site[1], {MISSING[0], 10})
    check_consistent(dataset, 2)


def test_with_a_radius_near_duplicates_go_too_and_without_it_stay(dataset, photo_site):
    (copy, original), port = next(iter(ALIKE.items())), photo_site[1]
    list_of = dataset.root.parent / "list.txt"
    list_of.write_text(uid_of(original, port))
    assert find_removal(dataset, list_of, "uid").num_samples == 1
    assert "1 duplicates of these stay" in find_removal(dataset, list_of, "uid").sentences()[2]
    found = find_removal(dataset, list_of, "uid", radius=4)
    assert found.num_duplicates_left == 0
    assert (found.num_listed, found.num_near_duplicates) == (1, 1)
    before = rows_of(dataset), members_of(dataset)
    remove(dataset, "uid", [uid_of(original, port)], radius=4)
    check_gone(before, dataset, port, {original, copy})
    check_consistent(dataset, 2)


def test_a_dry_run_writes_nothing(dataset, photo_site, digests):
    before = digests(dataset)
    path = dataset.root.parent / "list.txt"
    path.write_text(f"{uid_of(1, photo_site[1])}\n{'0' * 32}\n")
    found = find_removal(dataset, path, "uid")
    assert found.sentences()[0] == "2 entries by uid: 1 samples"
    assert digests(dataset) == before
    assert found.touched["select"] == found.touched["download"] != []


def test_shards_that_held_none_of_it_are_not_touched(dataset, photo_site):
    def stamps():
        paths = [
            p for folder in ("selection", "images", "dataset", "latents") for p in (dataset.root / folder).iterdir()
        ]
        return {dataset.relative(p): p.stat().st_ino for p in paths if p.suffix in (".tar", ".parquet")}

    before = stamps()
    removal = remove(dataset, "uid", [uid_of(2, photo_site[1])])
    changed = {name for name, inode in stamps().items() if before[name] != inode}
    stages = {"select": ["selection", "parquet"], "download": ["images", "parquet", "tar"]}
    stages |= {"pack": ["dataset", "parquet", "tar"], "encode": ["latents", "parquet", "tar"]}
    expected = {
        f"{f}/{s:05d}.{x}" for stage, (f, *kinds) in stages.items() for s in removal.touched[stage] for x in kinds
    }
    assert changed == expected
    assert all(len(shards) == 1 for stage, shards in removal.touched.items() if stage != "dedup")


def test_latents_and_packed_images_lie_where_the_tables_say(dataset, photo_site):
    before = LatentStore(dataset.root, 32)
    moments = dict(zip(before.uids(np.arange(len(before))), before.get(np.arange(len(before))), strict=True))
    remove(dataset, "uid", [uid_of(n, photo_site[1]) for n in (2, 9, 25)])
    after = LatentStore(dataset.root, 32)
    after.check_shards()
    assert len(after) == len(before) - 3
    for uid, found in zip(after.uids(np.arange(len(after))), after.get(np.arange(len(after))), strict=True):
        assert (found == moments[uid]).all()
    for shard in range(len(entries(dataset, "pack"))):
        content = dataset.packed_tar(shard).read_bytes()
        for row in pq.read_table(dataset.packed_table(shard)).to_pylist():
            assert content[row["picture_offset"] :][:3] == b"\xff\xd8\xff"


def test_a_second_list_adds_to_the_first_and_the_same_list_again_changes_nothing(dataset, photo_site, digests):
    port = photo_site[1]
    remove(dataset, "uid", [uid_of(2, port)])
    remove(dataset, "url", [url_of(9, port)])
    assert [e.num_in for e in entries(dataset, "remove")] == [1, 1]
    assert {row["listed_by"] for row in pq.read_table(dataset.removed).to_pylist()} == {"uid", "url", None}
    again = find_removal_of(dataset, [uid_of(2, port)])
    assert not again.has_effect
    assert again.sentences()[-1] == "All of it is blocked already."


def test_parquet_lists_are_read_and_wrong_ones_are_sentences(dataset, photo_site, tmp_path):
    pq.write_table(pa.table({"URL": [url_of(2, photo_site[1]), None]}), tmp_path / "list.parquet")
    assert find_removal(dataset, tmp_path / "list.parquet", "url").num_samples == 1
    with pytest.raises(UserError, match=r"is no list by host: it has no column host or domain\. It has: URL"):
        find_removal(dataset, tmp_path / "list.parquet", "host")
    with pytest.raises(UserError, match="cannot be read"):
        find_removal(dataset, tmp_path / "none.txt", "uid")
    (tmp_path / "bad.txt").write_text("abc\n")
    with pytest.raises(UserError, match=r"bad.txt, line 1: 'abc' is not a perceptual hash"):
        find_removal(dataset, tmp_path / "bad.txt", "phash")


def test_the_command_says_what_it_does_and_does_it(dataset, photo_site, monkeypatch, capsys):
    def sdtrain(*arguments):
        monkeypatch.setattr(sys, "argv", ["sdtrain", "remove", str(dataset.root), *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr()

    path = dataset.root.parent / "list.txt"
    path.write_text(f"{url_of(4, photo_site[1])}\n")
    command = ("--list", str(path), "--by", "url")
    code, said = sdtrain(*command, "--dry-run")
    found = "1 entries by url: 1 samples, 1 others with the same bytes"
    assert (code, said.out.splitlines()[0], said.out.splitlines()[-1]) == (0, found, "Nothing was written.")
    code, said = sdtrain(*command)
    assert (code, said.out.splitlines()[-1]) == (0, f"Removed: {found}.")
    code, said = sdtrain(*command)
    assert said.out.splitlines()[-1] == "All of it is blocked already."
    code, said = sdtrain("--list", str(path), "--by", "sha256")
    assert code == 2
    assert "list.txt, line 1: 'http://127.0.0.2" in said.err
