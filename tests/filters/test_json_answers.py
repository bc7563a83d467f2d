"""With --json, commands about a dataset print one JSON document, or an object a line, and nothing else."""

import sys

import pytest

from filters.inspect.views import write_views
from filters.recipe_record import read_recipe
from sdtrain import cli
from tests.filters.removal_fixtures import copy_of


def test_questions_about_a_dataset(document, photo_dataset, tmp_path):
    dataset = copy_of(photo_dataset, tmp_path)
    write_views(dataset, read_recipe(dataset))
    stages = {stage["stage"]: stage for stage in document("status", dataset.root)["stages"]}
    reasons = document("funnel", dataset.root)["reasons"]
    assert stages["pack"]["num_done"] == stages["pack"]["num_shards"] > 0
    assert reasons[-1]["remaining"] == stages["decide"]["num_out"]
    assert document("query", dataset.root, "SELECT count(*) AS n FROM kept") == {"n": reasons[-1]["remaining"]}


def test_changes_of_a_dataset(document, photo_dataset, tmp_path):
    dataset = copy_of(photo_dataset, tmp_path)
    previewed = document("decide", dataset.root, "--min-side", 80, "--dry-run")
    assert not previewed["written"]
    assert {"min_side", "kept"} <= {row["reason"] for row in previewed["reasons"]}
    assert document("decide", dataset.root, "--min-side", 80)["written"]
    (tmp_path / "list.txt").write_text("www.example.com\n")
    removal = document("remove", dataset.root, "--list", tmp_path / "list.txt", "--by", "host")
    assert removal["num_entries"] == 1
    assert removal["num_listed"] == 0
    assert isinstance(removal["said"], list)


def test_two_forms_at_once_are_refused(photo_dataset, capsys, monkeypatch):
    command = ["sdtrain", "query", str(photo_dataset.root), "SELECT 1", "--json", "--format", "csv"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "not both" in capsys.readouterr().err
