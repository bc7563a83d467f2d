"""Free SQL over a dataset: everything in it can be read, and nothing else can be read, written or changed."""

import csv
import json
import shutil
import sys

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from filters.inspect.query import ask
from filters.inspect.views import write_views
from filters.recipe import Recipe
from filters.recipe_record import read_recipe, record_recipe
from filters.select.stage import SELECT
from filters.select_config import SelectConfig
from sdtrain.cli import main
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.stage import run_batch
from sdtrain.errors import UserError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("query")
    urls = [f"https://example.com/{number}.jpg" for number in range(20)]
    pq.write_table(pa.table({"URL": urls, "TEXT": ["a, 'cäption'"] * 20, "WIDTH": [1] * 20}), folder / "m.parquet")
    dataset = DatasetDir(folder / "data")
    dataset.root.mkdir()
    recipe = Recipe(name="r", select=SelectConfig(metadata=str(folder / "m.parquet"), limit=5))
    record_recipe(dataset, recipe)
    run_batch(SELECT, dataset, recipe, [0])
    write_views(dataset, recipe)
    return dataset


def answer(dataset, sql, **options):
    with ask(dataset, sql, **options) as batches:
        return batches.read_all().to_pylist()


def test_views_and_the_metadata_outside_the_dataset_can_be_read(dataset):
    assert answer(dataset, "SELECT count(*) AS num FROM selection") == [{"num": 5}]
    assert answer(dataset, "SELECT count(*) AS num FROM metadata") == [{"num": 20}]
    assert len(answer(dataset, "DESCRIBE selection")) > 5
    assert "TABLE_SCAN" in str(answer(dataset, "FROM selection", explain=True))


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_text('/etc/hostname')",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM glob('/etc/*')",
        "FROM '/etc/passwd.parquet'",
        "SELECT * FROM read_parquet('http://127.0.0.1:1/a.parquet')",
        "COPY (SELECT 1) TO '{root}/a.csv'",
        "ATTACH '{root}/other.duckdb'",
        "CREATE TABLE t AS SELECT 1",
        "DROP VIEW selection",
        "SET enable_external_access = true",
        "SET allowed_directories = ['/']",
        "INSTALL httpfs",
        "LOAD '/tmp/x.duckdb_extension'",
        "SELECT 1; DROP VIEW selection",
        "INSERT INTO stages SELECT * FROM stages",
        "PRAGMA enable_profiling",
        "EXPORT DATABASE '{root}/out'",
        "SELEC 1",
        "SELECT nothing FROM selection",
        "",
    ],
)
def test_nothing_else_is_possible_and_the_reason_is_a_sentence(dataset, sql):
    before = sorted(dataset.root.rglob("*"))
    for explain in (False, True):
        with pytest.raises(UserError, match=r"cannot be answered|may only read|one SQL statement"):
            answer(dataset, sql.format(root=dataset.root), explain=explain)
    assert sorted(dataset.root.rglob("*")) == before


def test_a_moved_dataset_says_how_its_views_are_written_again(dataset, tmp_path):
    moved = DatasetDir(shutil.copytree(dataset.root, tmp_path / "moved"))
    with pytest.raises(UserError, match=r"was moved or copied .* Run `sdtrain views .*/moved`"):
        answer(moved, "FROM selection")
    assert answer(moved, "SELECT count(*) AS num FROM funnel")
    write_views(moved, read_recipe(moved))
    assert answer(moved, "SELECT count(*) AS num FROM selection") == [{"num": 5}]


def test_a_folder_beside_the_dataset_with_the_same_beginning_is_out_of_reach(dataset):
    secret = dataset.root.with_name(dataset.root.name + "-secret")
    secret.mkdir()
    pq.write_table(pa.table({"a": [1]}), secret / "s.parquet")
    for path in (secret / "s.parquet", dataset.root / ".." / secret.name / "s.parquet"):
        with pytest.raises(UserError, match="cannot be answered"):
            answer(dataset, f"FROM '{path}'")


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["sdtrain", "query", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def test_the_command_writes_tables_csv_json_and_parquet(dataset, tmp_path, monkeypatch, capsys):
    sql = "SELECT url, caption, [1, NULL] AS numbers, '\\xAA'::BLOB AS bytes FROM selection ORDER BY url"
    code, out, _ = run(monkeypatch, capsys, dataset.root, sql)
    assert code == 0
    assert out.count("example.com") == 5
    run(monkeypatch, capsys, dataset.root, sql, "--output", tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert (len(rows), rows[0]["caption"], rows[0]["bytes"]) == (5, "a, 'cäption'", "aa")
    code, out, _ = run(monkeypatch, capsys, dataset.root, sql, "--format", "json")
    assert [json.loads(line)["numbers"] for line in out.splitlines()] == [[1, None]] * 5
    run(monkeypatch, capsys, dataset.root, sql, "--output", tmp_path / "a.parquet")
    assert duckdb.sql(f"SELECT count(*), count(bytes) FROM '{tmp_path}/a.parquet'").fetchall() == [(5, 5)]


def test_without_sql_the_views_are_listed(dataset, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, dataset.root)
    assert code == 0
    assert "selection" in out
    assert "funnel" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--output", "answer.xlsx"], "What should answer.xlsx hold"),
        (["--format", "parquet"], "name a file"),
        (["--output", "/dev/null/a.csv"], "/dev/null/a.csv cannot be written"),
    ],
)
def test_mistakes_on_the_command_line_are_sentences(dataset, monkeypatch, capsys, options, words):
    code, _, err = run(monkeypatch, capsys, dataset.root, "FROM selection", *options)
    assert code == 2
    assert words in err


def test_a_folder_without_views_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no dataset"):
        answer(DatasetDir(tmp_path), "SELECT 1")
