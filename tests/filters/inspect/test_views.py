"""metadata.duckdb, asked by the real DuckDB shell from somewhere else."""

import csv
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from filters.inspect.query import QUESTIONS
from filters.inspect.views import write_views
from filters.pipeline import stages_of
from filters.recipe import Recipe
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import read_entry, write_entry
from sdtrain.model_card.training_summary import summarise_dataset
from tests.filters.dataset_fixtures import make_dataset

EMPTY = {stage.table.view: stage.table.columns for stage in stages_of(Recipe(name="plain"))}
SHELL = Path(sys.executable).parent / "duckdb"


def ask(database, sql):
    command = [str(SHELL), "-readonly", "-csv", str(database), "-c", sql]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=60)
    assert done.returncode == 0, done.stderr
    return list(csv.reader(io.StringIO(done.stdout)))[1:]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    dataset, recipe = make_dataset(tmp_path_factory.mktemp("it's here"))
    write_views(dataset, recipe)
    return dataset, recipe


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.title)
def test_every_question_has_an_answer(built, question):
    rows = ask(built[0].database, question.sql)
    asks_for_one_image = "LIKE" in question.sql
    assert rows or asks_for_one_image


def test_there_are_ten_questions_and_each_view_is_described(built):
    assert len(QUESTIONS) == 10
    sql = "SELECT view_name FROM duckdb_views() WHERE NOT internal AND comment IS NOT NULL UNION ALL "
    sql += "SELECT table_name FROM duckdb_tables() WHERE comment IS NOT NULL"
    assert {row[0] for row in ask(built[0].database, sql)} == {
        *EMPTY,
        "metadata",
        "kept",
        "drops",
        "score_pairs",
        "hosts",
        "remarks",
        "funnel",
        "stages",
    }


def test_views_hold_every_row_of_their_stage(built):
    views = ("metadata", "selection", "images", "scores", "duplicates", "decisions", "latents", "kept", "drops")
    counted = {view: int(ask(built[0].database, f"SELECT count(*) FROM {view}")[0][0]) for view in views}
    assert counted == {
        "metadata": 40, "selection": 35, "images": 35, "scores": 31, "duplicates": 2, "decisions": 35, "latents": 27,
        "kept": 27, "drops": 8,
    }  # fmt: skip


def test_drops_name_stage_reason_and_message(built):
    rows = ask(built[0].database, "SELECT stage, reason, error_message, count(*) FROM drops GROUP BY ALL ORDER BY ALL")
    assert rows == [
        ["decide", "duplicate_exact", "NULL", "1"],
        ["decide", "min_side", "NULL", "2"],
        ["download", "http_404", "http_404: detail", "2"],
        ["download", "not_an_image", "not_an_image: detail", "1"],
        ["download", "timeout", "timeout: detail", "1"],
        ["score", "undecodable", "NULL", "1"],
    ]


def test_the_summary_of_the_training_content_asks_these_views(built, tmp_path):
    dataset, recipe = built
    content = summarise_dataset("x", dataset.root, tmp_path / "domains.csv")
    numbers = (content.num_rows, content.num_selected, content.num_fetched, content.num_kept)
    assert [number.value for number in numbers] == [40, 35, 31, 27]
    assert sum(number for _, number in content.domains.first.rows) == content.domains.images_top.value
    dated = read_entry(dataset, "download", 0).model_copy(update={"finished_at": 1_762_000_000.0})
    write_entry(dataset, dated)
    write_views(dataset, recipe)
    assert summarise_dataset("x", dataset.root, tmp_path / "domains.csv").first_day.value == "2025-11-01"


def test_latents_say_in_which_tar_they_lie(built):
    dataset = built[0]
    tars = ask(dataset.database, "SELECT DISTINCT tar, shard FROM latents")
    assert tars == [[str(dataset.latents_tar(0)), "0"]]


def test_after_a_move_the_views_follow_when_they_are_written_again(built, tmp_path):
    dataset, recipe = built
    moved = DatasetDir(Path(shutil.copytree(dataset.root, tmp_path / "elsewhere")))
    write_views(moved, recipe)
    assert ask(moved.database, "SELECT DISTINCT tar FROM latents") == [[str(moved.latents_tar(0))]]


@pytest.mark.parametrize("name", ["two\nlines", "it's [0-9]*, 100 %", "a, b"])
def test_a_folder_may_have_any_name(built, tmp_path, name):
    moved = DatasetDir(tmp_path / name)
    shutil.copytree(built[0].root, moved.root)
    write_views(moved, built[1])
    assert ask(moved.database, "SELECT count(*) FROM images") == ask(built[0].database, "SELECT count(*) FROM images")


def test_stages_that_have_not_run_give_empty_views_with_the_same_columns(built, tmp_path):
    _, recipe = built
    empty = DatasetDir(tmp_path / "nothing")
    write_views(empty, recipe)
    for view, columns in EMPTY.items():
        assert ask(empty.database, f"SELECT * FROM {view}") == []
        shown = ask(empty.database, f"SELECT column_name, column_type FROM (DESCRIBE {view})")
        assert dict(shown) == columns
    assert (
        ask(empty.database, "FROM funnel")
        == ask(empty.database, "FROM kept")
        == ask(empty.database, "FROM drops")
        == []
    )


def test_columns_of_finished_stages_are_those_that_empty_views_promise(built):
    for view in ("selection", "images", "duplicates", "decisions"):
        shown = ask(built[0].database, f"SELECT column_name, column_type FROM (DESCRIBE {view})")
        assert dict(shown) == EMPTY[view], view


def test_an_open_reader_keeps_its_database_while_a_new_one_is_written(built, tmp_path):
    dataset, recipe = built
    command = [str(SHELL), "-readonly", "-csv", str(dataset.database)]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    reader.stdin.write("SELECT count(*) FROM funnel;\n")
    reader.stdin.flush()
    assert reader.stdout.readline()
    write_views(dataset, recipe)
    answer, _ = reader.communicate("SELECT count(*) FROM drops;\n", timeout=30)
    assert answer.splitlines()[-1] == "8"


def test_shards_of_an_earlier_larger_selection_are_not_shown(tmp_path):
    dataset, recipe = make_dataset(tmp_path)
    select = recipe.select.model_copy(update={"samples_per_shard": 40})
    from filters.select.stage import SELECT
    from sdtrain.dataset.stage import run_batch

    smaller = recipe.model_copy(update={"select": select})
    run_batch(SELECT, dataset, smaller, [0])
    write_views(dataset, smaller)
    assert ask(dataset.database, "SELECT DISTINCT shard FROM images") == [["0"]]


def test_a_column_that_only_later_files_have_is_shown_once(tmp_path):
    dataset, recipe = make_dataset(tmp_path)
    table = pq.read_table(dataset.selection(1))
    scores = pa.array([7.5] * len(table), pa.float64())
    pq.write_table(table.append_column("aesthetic_v1", scores), dataset.selection(1))
    write_views(dataset, recipe)
    shown = ask(dataset.database, "SELECT shard, count(*), count(aesthetic_v1) FROM selection GROUP BY ALL ORDER BY 1")
    assert shown == [["0", "15", "0"], ["1", "15", "15"], ["2", "5", "0"]]
