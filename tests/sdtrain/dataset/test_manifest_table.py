"""The table of a stage's entries says what their files say, whatever happened to it; entries are written whole."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from sdtrain.dataset import manifest, manifest_table
from sdtrain.dataset.files import sweep
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import (
    bulk_reads,
    entries,
    num_selected_shards,
    read_entry,
    require_entries,
    selected_shards,
    write_entries,
    write_entry,
)
from sdtrain.dataset.shard_report import Output, ShardReport
from sdtrain.errors import UserError

STAGE, LONG_AGO = "download", time.time() - 3600


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    monkeypatch.setattr(manifest_table, "_WORTH_WRITING", 1)
    monkeypatch.setattr(manifest_table, "_cached", {})


@pytest.fixture
def dataset(tmp_path):
    dataset = DatasetDir(tmp_path)
    for shard in range(5):
        write(dataset, shard)
    return dataset


def report(shard: int, num_out: int = 7, **changed) -> ShardReport:
    outputs = {f"images/{shard:05d}.parquet": Output(sha256="a" * 64, bytes=10 + shard)}
    content = {"num_in": 10, "num_out": num_out, "dropped": {"timeout": 10 - num_out}, "outputs": outputs}
    return ShardReport(stage=STAGE, shard=shard, **content | {"notes": [f"note {shard % 2}"]} | changed)


def write(dataset: DatasetDir, shard: int, at: float | None = LONG_AGO, **changed) -> None:
    write_entry(dataset, report(shard, **changed))
    if at is not None:
        os.utime(dataset.manifest_entry(STAGE, shard), (at, at))


def table_file(dataset: DatasetDir) -> Path:
    return dataset.root / "manifest" / f"{STAGE}.parquet"


def forget_memory() -> None:
    """As another process begins."""
    manifest_table._cached.clear()


def count_reads(monkeypatch) -> list[Path]:
    read, original = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or original(path))
    return read


def test_it_gives_what_the_files_say(dataset):
    found = entries(dataset, STAGE)
    assert list(found) == [report(shard) for shard in range(5)]
    assert (found[-1], found[1:3]) == (report(4), [report(1), report(2)])
    assert (found.get(3), found.get(5), found.get(-1)) == (report(3), None, None)
    assert (found.total("num_in"), found.total("num_out"), found.total("num_bytes")) == (50, 35, 60)
    assert found.dropped() == Counter(timeout=15)
    assert found.listed("notes") == ["note 0", "note 1"]
    assert found.listed("tables") == [f"images/{shard:05d}.parquet" for shard in range(5)]
    assert list(found.below(2)) == [report(0), report(1)]


def test_a_stage_without_entries_has_none(tmp_path):
    found = entries(DatasetDir(tmp_path), STAGE)
    assert (list(found), found.total("num_in"), found.dropped(), found.listed("notes")) == ([], 0, Counter(), [])
    assert list(found.below(3)) == []


def test_another_process_reads_no_entry_again(dataset, monkeypatch):
    entries(dataset, STAGE)
    forget_memory()
    read = count_reads(monkeypatch)
    assert list(entries(dataset, STAGE)) == [report(shard) for shard in range(5)]
    assert read == []


def test_counts_are_told_without_the_entries(dataset, monkeypatch):
    entries(dataset, STAGE)
    forget_memory()
    found = entries(dataset, STAGE)
    assert (found.total("num_in"), found.table["entry"].null_count) == (50, 5)
    assert found.get(2) == report(2)
    assert entries(dataset, STAGE).table["entry"].null_count == 0, "they are read once in a process"


def test_an_entry_is_there_though_the_table_was_deleted_or_follows_other_files(dataset):
    entries(dataset, STAGE)
    forget_memory()
    before = entries(dataset, STAGE)
    table_file(dataset).unlink()
    assert list(before) == [report(shard) for shard in range(5)]
    forget_memory()
    entries(dataset, STAGE)
    forget_memory()
    before = entries(dataset, STAGE)
    write(dataset, 1, at=LONG_AGO + 60, num_out=2)
    forget_memory()
    entries(dataset, STAGE)
    assert list(before) == [report(0), report(1, num_out=2), *(report(shard) for shard in (2, 3, 4))]
    assert before.with_others(before.below(3)).get(4) == report(4)


def test_an_entry_that_was_deleted_since_is_named(dataset):
    entries(dataset, STAGE)
    forget_memory()
    before = entries(dataset, STAGE)
    table_file(dataset).unlink()
    dataset.manifest_entry(STAGE, 3).unlink()
    with pytest.raises(UserError, match=r"00003\.json was deleted while it was read"):
        before.get(0)


@pytest.mark.parametrize(("ago_s", "is_written"), [(3600, True), (10, False)])
def test_few_new_entries_are_written_down_once_the_stage_is_quiet(dataset, monkeypatch, ago_s, is_written):
    monkeypatch.setattr(manifest_table, "_SHARE_WORTH_WRITING", 0.5)
    entries(dataset, STAGE)
    before = table_file(dataset).read_bytes()
    write(dataset, 5, at=time.time() - ago_s)
    forget_memory()
    assert len(entries(dataset, STAGE)) == 6
    assert (table_file(dataset).read_bytes() != before) == is_written


def test_the_number_of_selected_shards_is_told_without_reading_a_large_selections_entry(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_table, "_WORTH_WRITING", 256)
    monkeypatch.setattr(manifest_table, "_BYTES_WORTH_WRITING", 500)
    dataset = DatasetDir(tmp_path)
    assert num_selected_shards(dataset, None) is None
    for number in range(2):
        outputs = {
            f"selection/{shard:05d}.parquet": Output(sha256="a" * 64, bytes=1) for shard in range(4 + 3 * number)
        }
        entry = ShardReport(stage="select", shard=number, num_in=1, num_out=1, outputs=outputs)
        write_entry(dataset, entry)
        os.utime(dataset.manifest_entry("select", number), (LONG_AGO, LONG_AGO))
    assert num_selected_shards(dataset, None) == len(selected_shards(dataset)) == 7
    forget_memory()
    read = count_reads(monkeypatch)
    assert num_selected_shards(dataset, None) == 7
    assert not read


@pytest.mark.parametrize("other_process", [False, True])
def test_what_changed_is_read_and_nothing_else(dataset, monkeypatch, other_process):
    entries(dataset, STAGE)
    write(dataset, 1, at=LONG_AGO + 60, num_out=2)
    write(dataset, 7)
    dataset.manifest_entry(STAGE, 3).unlink()
    if other_process:
        forget_memory()
    read = count_reads(monkeypatch)
    expected = [report(0), report(1, num_out=2), report(2), report(4), report(7)]
    assert list(entries(dataset, STAGE)) == expected
    assert [path.name for path in read] == ["00001.json", "00007.json"]
    forget_memory()
    assert list(entries(dataset, STAGE)) == expected


def test_an_entry_that_was_written_a_moment_ago_is_read_again(dataset):
    """Its file may change within the same tick of the clock, to the same size."""
    write(dataset, 2, at=None, num_out=5)
    entries(dataset, STAGE)
    status = dataset.manifest_entry(STAGE, 2).stat()
    write(dataset, 2, at=None, num_out=6)
    os.utime(dataset.manifest_entry(STAGE, 2), ns=(status.st_atime_ns, status.st_mtime_ns))
    for _ in range(2):
        assert entries(dataset, STAGE).get(2) == report(2, num_out=6)
        forget_memory()


@pytest.mark.parametrize("content", [b"", b"PAR1", b"\0" * 1000], ids=["empty", "cut", "zeros"])
def test_a_damaged_table_is_written_again(dataset, content):
    entries(dataset, STAGE)
    table_file(dataset).write_bytes(content)
    forget_memory()
    assert list(entries(dataset, STAGE)) == [report(shard) for shard in range(5)]
    assert table_file(dataset).stat().st_size > 1000


def test_a_table_that_cannot_be_written_is_done_without(dataset, monkeypatch):
    def full(path):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(manifest_table, "publish", full)
    assert list(entries(dataset, STAGE)) == [report(shard) for shard in range(5)]
    assert not table_file(dataset).exists()


def test_the_order_is_that_of_numbers_from_100_000_on(dataset):
    write(dataset, 100_000)
    write(dataset, 99_999)
    assert entries(dataset, STAGE).shards.tolist() == [0, 1, 2, 3, 4, 99_999, 100_000]


def test_a_damaged_entry_is_named(dataset):
    path = dataset.manifest_entry(STAGE, 1)
    path.write_text("{")
    with pytest.raises(UserError, match=r"00001\.json is not a manifest entry"):
        entries(dataset, STAGE)


def test_bulk_reads_read_no_file_twice(dataset, monkeypatch):
    entries(dataset, STAGE)
    read = count_reads(monkeypatch)
    with bulk_reads():
        assert [read_entry(dataset, STAGE, shard) for shard in range(6)] == [*map(report, range(5)), None]
    assert read == []
    assert read_entry(dataset, STAGE, 0) == report(0)  # afterwards the file is asked again
    assert len(read) == 1


def test_a_shard_that_is_not_finished_is_named(dataset):
    assert list(require_entries(dataset, STAGE, [3, 0])) == [report(3), report(0)]
    with pytest.raises(UserError, match="Shard 00005 of stage 'download' is not finished"):
        list(require_entries(dataset, STAGE, [0, 5]))


CONSOLIDATE_AND_DIE = """
import os, signal, sys
from pathlib import Path
import pyarrow.parquet as pq
from sdtrain.dataset import files, manifest_table

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def write_half(table, path, **how):
    write(table, path, **how)
    os.truncate(path, Path(path).stat().st_size // 2)
    die()

def die_at(number):
    calls = iter(range(number))
    sync = files._sync
    files._sync = lambda path: sync(path) if next(calls, None) is not None else die()

write, manifest_table._WORTH_WRITING = pq.write_table, 1
match sys.argv[2]:
    case "half written":
        pq.write_table = write_half
    case "written":
        die_at(0)
    case "renamed":
        die_at(1)
manifest_table.stage_entries(Path(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("moment", "has_table"), [("half written", False), ("half written", True), ("written", True), ("renamed", True)]
)
def test_a_kill_while_the_table_is_written_loses_nothing(dataset, moment, has_table):
    if has_table:
        entries(dataset, STAGE)
        write(dataset, 2, at=LONG_AGO + 60, num_out=1)
        write(dataset, 5)
        dataset.manifest_entry(STAGE, 0).unlink()
    folder = dataset.manifest_entry(STAGE, 0).parent
    files = {path: path.read_bytes() for path in folder.iterdir()}
    killed = subprocess.run([sys.executable, "-c", CONSOLIDATE_AND_DIE, str(folder), moment])
    assert killed.returncode == -signal.SIGKILL
    assert len(list(folder.parent.glob(".*.partial"))) == (moment != "renamed")
    assert table_file(dataset).exists() == (has_table or moment == "renamed")
    forget_memory()
    expected = [report(1), report(2, num_out=1), *map(report, (3, 4, 5))] if has_table else list(map(report, range(5)))
    assert list(entries(dataset, STAGE)) == expected
    assert {path: path.read_bytes() for path in folder.iterdir()} == files
    sweep(folder.parent)
    assert list(folder.parent.glob(".*.partial")) == []


def test_each_shard_has_one_entry_whatever_else_lies_in_the_folder(dataset):
    write(dataset, 100_000)
    folder = dataset.manifest_entry(STAGE, 0).parent
    for name in (
        "7.json",
        "000001.json",
        "0100000.json",
        "00001.json~",
        "00001 (copy).json",
        "99999999999.json",
        "٣.json",
    ):
        (folder / name).write_text(report(1).model_dump_json())
    found = entries(dataset, STAGE)
    assert found.shards.tolist() == [0, 1, 2, 3, 4, 100_000]
    assert found.total("num_in") == 60


def test_entries_of_a_clock_that_was_set_back_since_are_read_once(dataset, monkeypatch):
    for shard in range(5):
        write(dataset, shard, time.time() + 86_400)
    entries(dataset, STAGE)
    forget_memory()
    read = count_reads(monkeypatch)
    assert len(entries(dataset, STAGE)) == 5
    assert read == []
    write(dataset, 2, num_out=9)
    assert entries(dataset, STAGE).total("num_out") == 4 * 7 + 9
    assert [path.name for path in read] == ["00002.json"]


def test_many_entries_wait_for_the_disk_together(tmp_path, monkeypatch):
    one_by_one, together = DatasetDir(tmp_path / "a"), DatasetDir(tmp_path / "b")
    for shard in range(5):
        write_entry(one_by_one, report(shard))
    synced = list[str]()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append("file"))
    monkeypatch.setattr(os, "sync", lambda: synced.append(f"{len(visible(together))} entries"))
    monkeypatch.setattr(manifest, "_WRITTEN_AT_ONCE", 3)
    write_entries(together, ((report(shard), ()) for shard in range(5)))
    assert visible(together) == visible(one_by_one)
    # No entry has its name before its content is on the disk, and at the end the names are there as well.
    assert synced == ["0 entries", "3 entries", "5 entries"]


def test_entries_before_a_failure_are_whole_and_nothing_else_is_left(tmp_path, monkeypatch):
    dataset = DatasetDir(tmp_path)
    monkeypatch.setattr(manifest, "_WRITTEN_AT_ONCE", 3)

    def reports():
        for shard in range(5):
            if shard == 4:
                raise UserError("a file is damaged")
            yield report(shard), ()

    with pytest.raises(UserError, match="a file is damaged"):
        write_entries(dataset, reports())
    assert list(visible(dataset)) == ["00000.json", "00001.json", "00002.json"]
    assert len(list(dataset.manifest_entry(STAGE, 0).parent.iterdir())) == 3


def visible(dataset: DatasetDir) -> dict[str, str]:
    """The entries by name, with their contents."""
    return {path.name: path.read_text() for path in sorted(dataset.manifest_entry(STAGE, 0).parent.glob("[0-9]*.json"))}
