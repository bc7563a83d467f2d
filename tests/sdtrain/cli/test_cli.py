import inspect
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from filters.build_options import BuildOptions
from filters.pipeline import STAGES
from filters.recipe import load_recipe
from filters.recipe_record import read_recipe
from filters.select.stage import SELECT
from sdtrain import cli
from sdtrain.cli.output import print_table
from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs
from sdtrain.dataset.shard_report import ShardReport, fingerprint


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> SimpleNamespace:
    monkeypatch.setattr(sys, "argv", ["sdtrain", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    return SimpleNamespace(code=end.value.code, out=captured.out, err=captured.err)


@pytest.fixture
def sdtrain(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


@pytest.fixture
def short_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first stage of two shards that reads nothing, and nothing behind it, so that the command can be tried alone."""

    def shards(dataset: DatasetDir, recipe: Any) -> list[int]:
        return [0, 1]

    def digest(dataset: DatasetDir, recipe: Any, shard: int) -> str:
        return fingerprint("select/1", recipe.select.model_dump())

    def do(dataset: DatasetDir, recipe: Any, shards: Any) -> Any:
        for shard in shards:
            path = dataset.selection(shard)
            with publish(path) as temporary:
                temporary.write_text("rows")
            outputs = describe_outputs(dataset, [path])
            yield ShardReport(
                stage="select", shard=shard, num_in=5, num_out=3, dropped={"min_side": 2}, outputs=outputs
            )

    monkeypatch.setattr("filters.preflight.BuildPreflight", lambda dataset, recipe: lambda *_: None)
    stages = (
        replace(SELECT, shards=shards, fingerprint=digest, run=do),
        *(replace(stage, shards=lambda *_: []) for stage in STAGES[1:]),
    )
    monkeypatch.setattr("filters.pipeline.STAGES", stages)
    finish = SimpleNamespace(finish_dataset=lambda dataset, recipe: dataset.database.write_text(""))
    monkeypatch.setitem(sys.modules, "filters.inspect.report", finish)


def test_build_offers_every_option() -> None:
    parameters = inspect.signature(cli.curate.build).parameters
    assert [field.name for field in fields(BuildOptions)] == [name for name in parameters if name != "recipe"]


def test_recipes_are_listed_with_their_descriptions(sdtrain: Any) -> None:
    listing = sdtrain("recipes").out
    assert "laion-aesthetics" in listing
    assert "aesthetic score (V2) > 5.0" in listing


def test_shown_recipe_is_itself_a_recipe(sdtrain: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(sdtrain("recipe", "laion-aesthetics").out)
    assert load_recipe(str(tmp_path / "mine.yaml")) == load_recipe("laion-aesthetics")


def test_build_says_one_line_a_stage_and_the_second_time_does_nothing(
    sdtrain: Any, tmp_path: Path, short_pipeline: None
) -> None:
    command = ("build", "laion-aesthetics", "--metadata", "rows.parquet", "--output", tmp_path / "{recipe}")
    first = sdtrain(*command)
    assert first.code == 0
    assert "select: 2 shards, 10 in, 6 out, 4 dropped (min_side 4)" in first.out
    assert (tmp_path / "laion-aesthetics" / "metadata.duckdb").exists()
    assert "select: finished before, nothing to do" in sdtrain(*command).out


def test_build_into_the_output_of_another_recipe_says_what_changed(
    sdtrain: Any, tmp_path: Path, short_pipeline: None
) -> None:
    command = ("build", "laion-aesthetics", "--metadata", "rows.parquet", "--output", tmp_path)
    sdtrain(*command)
    changed = sdtrain(*command, "--limit", 7)
    assert "select.limit: None -> 7" in changed.out
    assert "select: 2 shards, 10 in" in changed.out
    assert read_recipe(DatasetDir(tmp_path)).select.limit == 7


def test_status_counts_what_is_finished(sdtrain: Any, tmp_path: Path, short_pipeline: None) -> None:
    sdtrain("build", "laion-aesthetics", "--metadata", "rows.parquet", "--output", tmp_path)
    lines = sdtrain("status", tmp_path).out.splitlines()
    assert lines[0] == "recipe: laion-aesthetics"
    assert [line.split()[:4] for line in lines if line.split()[:1] == ["select"]] == [["select", "2/2", "10", "6"]]
    assert [line.split()[:4] for line in lines if line.split()[:1] == ["encode"]] == [["encode", "0/?", "0", "0"]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("build", "laion-aesthetic", "--metadata", "x"), "Did you mean 'laion-aesthetics'?"),
        (("build", "laion-aesthetics", "--metadata", "x", "--limit", "0"), "'limit' is 0"),
        (("build", "laion-aesthetics", "--output", "/proc/none"), "names no metadata"),
        (("build", "laion-aesthetics", "--metadata", "x", "--output", "/dev/null/x"), "cannot be written"),
        (("status", "/no/such/dataset"), "holds no dataset"),
        (("recipe", "mine.yml"), "There is no file mine.yml"),
    ],
)
def test_mistake_is_one_sentence_and_exit_code_2(
    sdtrain: Any, short_pipeline: None, arguments: tuple[str, ...], sentence: str
) -> None:
    done = sdtrain(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert sentence in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1


def test_a_table_in_a_pipe_is_not_cut(capsys):
    row = {"caption": "a long caption " * 20, "url": f"https://host.example/{'x' * 200}.jpg", "num": 1234567}
    print_table([row])
    printed = capsys.readouterr().out
    assert all(value in printed for value in (str(row["caption"]).strip(), row["url"], "1,234,567"))
