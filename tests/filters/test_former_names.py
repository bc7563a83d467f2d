"""Datasets and recipes of earlier versions, whose stage `decide` was called `keep`, are read and go on."""

import json
import shutil

import pytest
import yaml
from typer.testing import CliRunner

from filters.decide.funnel import funnel
from filters.decide.stage import DECIDE
from filters.inspect.query import ask
from filters.inspect.status import dataset_status
from filters.inspect.views import write_views
from filters.pipeline import STAGES, stages_of
from filters.recipe import Recipe, load_recipe
from filters.recipe_record import read_recipe, record_recipe
from filters.remove.apply import finish_removal, start_removal
from sdtrain.cli import app
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import entries, recorded_stages, require_entry, selected_shards, selection
from sdtrain.dataset.shard_report import fingerprint
from sdtrain.errors import UserError
from sdtrain.pack.stage import PACK
from tests.filters.removal_fixtures import build, check_consistent, copy_of, find_removal_of, remove, uid_of


def rename_to_former(dataset: DatasetDir) -> None:
    """Gives what a build wrote the names that earlier versions wrote."""
    folder = dataset.root / "manifest"
    (folder / "decide").rename(folder / "keep")
    for path in (folder / "keep").iterdir():
        path.write_text(path.read_text().replace('"stage": "decide"', '"stage": "keep"'))
    recipe = yaml.safe_load(dataset.recipe.read_text())
    recipe["keep"] = recipe.pop("decide")
    dataset.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False))


@pytest.fixture
def former(photo_dataset, tmp_path):
    dataset = copy_of(photo_dataset, tmp_path)
    build(dataset, read_recipe(dataset))  # its metadata lie elsewhere now
    rename_to_former(dataset)
    return dataset


def test_a_second_build_does_nothing_and_writes_the_recipe_with_the_new_name(former):
    before = {path: path.read_bytes() for path in (former.root / "manifest").rglob("*.json")}
    assert record_recipe(former, read_recipe(former)) == []
    assert build(former, read_recipe(former)) == []
    assert {path: path.read_bytes() for path in (former.root / "manifest").rglob("*.json")} == before
    assert yaml.safe_load(former.recipe.read_text())["decide"]["rules"] == {"min_side": 64.0}
    assert "keep" not in yaml.safe_load(former.recipe.read_text())


def test_status_funnel_and_views_call_it_decide(former):
    (status,) = (stage for stage in dataset_status(former).stages if stage.stage == "decide")
    assert (status.num_done, status.num_shards) == (1, 1)
    assert set(recorded_stages(former)) == {stage.name for stage in stages_of(read_recipe(former))}
    recipe = read_recipe(former)
    assert {row["stage"] for row in funnel(former, recipe, STAGES)} == {"select", "download", "decide"}
    write_views(former, recipe)
    for view in ("stages", "funnel", "drops"):
        asked = f"SELECT count(*) FILTER (stage = 'decide') > 0, count(*) FILTER (stage = 'keep') FROM {view}"
        with ask(former, asked) as batches:
            assert [list(row.values()) for row in batches.read_all().to_pylist()] == [[True, 0]]


def test_other_rules_replace_the_former_entry(former):
    result = CliRunner().invoke(app, ["decide", str(former.root), "--rule", "min_side=90", "--decide-by", "picture"])
    assert result.exit_code == 0, result.output
    assert read_recipe(former).decide.decide_by == "image"
    assert not list((former.root / "manifest" / "keep").iterdir())
    assert [entry.stage for entry in entries(former, "decide")] == ["decide"]
    assert {report.stage for report in build(former, read_recipe(former))} <= {"pack", "encode"}
    assert build(former, read_recipe(former)) == []


def test_samples_are_removed_from_it(former, photo_site):
    remove(former, "uid", [uid_of(8, photo_site[1])])
    check_consistent(former, 1)


def test_a_removal_that_an_earlier_version_began_is_finished(former, photo_site):
    start_removal(former, find_removal_of(former, [uid_of(8, photo_site[1])]))
    journal = json.loads(former.removal.read_text())
    for shards in (journal["touched"], journal["finished"]):
        shards["keep"] = shards.pop("decide")
    former.removal.write_text(json.dumps(journal))
    assert finish_removal(former)
    check_consistent(former, 1)


def test_an_entry_under_todays_name_counts_before_one_under_the_former(former):
    shutil.copytree(former.root / "manifest" / "keep", former.root / "manifest" / "decide")
    today = former.manifest_entry("decide", 0)
    assert today.parent.name == "decide"
    today.write_text(today.read_text().replace('"fingerprint": "', '"fingerprint": "new'))
    assert [entry.fingerprint[:3] for entry in entries(former, "decide")] == ["new"]


def test_fingerprints_are_those_that_earlier_versions_recorded(photo_dataset):
    shards = selected_shards(photo_dataset)
    inputs = [require_entry(photo_dataset, stage, shard) for stage in ("download", "score") for shard in shards]
    inputs = [selection(photo_dataset), *inputs, require_entry(photo_dataset, "dedup", 0)]
    changed = {"decide": {"rules": {"min_side": 64}, "decide_by": "image"}}
    recipe = Recipe.model_validate(read_recipe(photo_dataset).model_dump() | changed)
    config = {"decide_by": "picture", "rules": [("min_side", 64.0)]}
    assert DECIDE.fingerprint(photo_dataset, recipe, 0) == fingerprint("keep/1", config, inputs)
    decided = require_entry(photo_dataset, "decide", 0)
    config = {"samples_per_shard": 6, "seed": 42, "keep": decided.fingerprint}
    assert PACK.fingerprint(photo_dataset, recipe, 0) == fingerprint("pack/1", config, [decided])


def test_a_recipe_may_call_the_section_keep_but_not_twice(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("name: old\nkeep: {decide_by: picture, rules: {min_side: 512}}\n")
    recipe = load_recipe(str(path))
    assert recipe == Recipe(name="old", decide={"decide_by": "image", "rules": {"min_side": 512}})
    path.write_text("name: old\nkeep: {rules: {min_side: 512}}\ndecide: {}\n")
    with pytest.raises(UserError, match=r"old\.yaml: keep is the former name of decide: give one of the two sections"):
        load_recipe(str(path))
