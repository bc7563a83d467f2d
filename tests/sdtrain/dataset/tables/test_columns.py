"""Tables of many files are scanned by their columns' names, each file's footer being read once."""

import os
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.tables import columns
from sdtrain.dataset.tables.columns import TableColumns
from sdtrain.dataset.tables.connection import connected
from sdtrain.errors import UserError

LONG_AGO = time.time() - 3600
WIDE, NARROW = {"uid": "a", "score": 1.5}, {"uid": "b"}


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    monkeypatch.setattr(columns, "_WORTH_WRITING", 1)


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "manifest").mkdir()
    return DatasetDir(tmp_path)


def write(dataset, shard, row):
    path = dataset.scores(shard)
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist([row]), path)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def rows(dataset, paths):
    tables = TableColumns(dataset)
    scan = tables.scan(paths, "scores")
    tables.save()
    with connected() as connection:
        return connection.execute(f"SELECT uid, score FROM ({scan.sql}) ORDER BY filename", scan.values).fetchall()


def count_reads(monkeypatch):
    read, original = [], pq.read_schema
    monkeypatch.setattr(pq, "read_schema", lambda path: read.append(path) or original(path))
    return read


def test_files_of_other_columns_are_rows_of_one_scan(dataset):
    paths = [write(dataset, shard, row) for shard, row in enumerate([WIDE, NARROW, WIDE, NARROW])]
    assert TableColumns(dataset).groups(paths) == [[paths[0], paths[2]], [paths[1], paths[3]]]
    assert rows(dataset, paths) == [("a", 1.5), ("b", None), ("a", 1.5), ("b", None)]


def test_a_footer_is_read_once_and_again_when_its_file_has_changed(dataset, monkeypatch):
    paths = [write(dataset, shard, WIDE) for shard in range(4)]
    read = count_reads(monkeypatch)
    assert rows(dataset, paths) == [("a", 1.5)] * 4
    assert sorted(read) == paths
    read.clear()
    assert rows(dataset, paths) == [("a", 1.5)] * 4
    assert read == []
    write(dataset, 2, NARROW)
    added = write(dataset, 4, NARROW)
    assert rows(dataset, [*paths, added]) == [("a", 1.5), ("a", 1.5), ("b", None), ("a", 1.5), ("b", None)]
    assert sorted(read) == [paths[2], added]


def test_a_missing_or_damaged_file_is_named(dataset):
    paths = [write(dataset, shard, WIDE) for shard in range(2)]
    paths[1].write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"00001\.parquet cannot be read.*Run the build again"):
        TableColumns(dataset).groups(paths)
    paths[1].unlink()
    with pytest.raises(UserError, match=r"00001\.parquet cannot be read.*Run the build again"):
        TableColumns(dataset).groups(paths)


def test_duckdb_keeps_nothing_of_the_files_it_has_read(dataset):
    paths = [write(dataset, shard, WIDE) for shard in range(20)]
    with connected() as connection:
        connection.execute("SELECT sum(score) FROM read_parquet(?)", [list(map(str, paths))]).fetchall()
        kept = "SELECT sum(memory_usage_bytes) FROM duckdb_memory() WHERE tag = 'EXTERNAL_FILE_CACHE'"
        assert connection.execute(kept).fetchall() == [(0,)]


def test_what_is_remembered_by_another_version_is_read_again(dataset):
    paths = [write(dataset, 0, WIDE)]
    remembered = dataset.root / "manifest" / "columns.parquet"
    unlike = pa.table({"file": ["scores/00000.parquet"], "mtime_ns": ["?"], "bytes": [1], "columns": ["uid string"]})
    for table in (unlike, unlike.select(["file"]), unlike.append_column("more", [[1]])):
        pq.write_table(table, remembered)
        assert rows(dataset, paths) == [("a", 1.5)]
