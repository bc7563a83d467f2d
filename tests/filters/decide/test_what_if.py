"""Other rules for a finished dataset: what they would keep is told at once, and nothing but the decisions changes."""

import sys

import pyarrow.parquet as pq
import pytest

from filters.decide.stage import DECIDE
from filters.decide.what_if import compare, decide_again, parse_rules, with_decide_rules
from filters.pipeline import STAGES
from filters.recipe import DecideConfig, Recipe
from filters.recipe_record import read_recipe, record_recipe
from filters.select_config import SelectConfig
from sdtrain import cli
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.errors import UserError
from sdtrain.pack.stage import PACK
from tests.filters.decide.test_stage import GOOD, row, write_dataset
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads


@pytest.fixture
def dataset(tmp_path):
    """Eight images: two failed, one small, aesthetic scores from 4 to 6.5 in the metadata, the reverse by us."""
    scores = [GOOD | {"aesthetic": 4 + 0.5 * i} for i in range(6)]
    rows = [row(scores=scores[i], ours=scores[5 - i]) for i in range(6)]
    rows[5] = row(scores=scores[5], ours=scores[0], original_px=(600, 300))
    rows += [row(image=None, reason="timeout")] * 2
    dataset = write_dataset(tmp_path / "data", rows)
    recipe = Recipe(name="test", select=SelectConfig(metadata="x"), decide=DecideConfig(rules={"min_aesthetic": 4.2}))
    record_recipe(dataset, recipe)
    run_batch(DECIDE, dataset, recipe, [0])
    return dataset


def now(dataset, rules, **options):
    compared = compare(dataset, with_decide_rules(read_recipe(dataset), rules, **options), STAGES)
    return {row["reason"]: (row["before"], row["now"]) for row in compared}


def test_the_new_funnel_stands_beside_the_old_one(dataset):
    assert now(dataset, {"min_aesthetic": 5.2}) == {"timeout": (2, 2), "min_aesthetic": (1, 3), "kept": (5, 3)}
    assert now(dataset, {"min_side": 512}) == {
        "timeout": (2, 2),
        "min_aesthetic": (1, 1),
        "min_side": (0, 1),
        "kept": (5, 4),
    }


def test_it_can_be_decided_by_our_scores(dataset):
    by_image = now(dataset, {"min_aesthetic": 6.2}, decide_by="image")
    assert by_image["kept"] == (5, 1)


def test_comparing_writes_nothing_and_needs_no_image(dataset, digests):
    before = digests(dataset)
    for tar in (dataset.root / "images").glob("*.tar"):
        before.pop(dataset.relative(tar))
        tar.unlink()
    now(dataset, {"min_aesthetic": 5.2})
    assert digests(dataset) == before


def test_a_rule_keeps_its_place_and_a_new_one_comes_behind(dataset):
    recipe = Recipe(name="test", decide={"rules": {"min_side": 1, "min_aesthetic": 5}})
    changed = with_decide_rules(recipe, {"max_unsafe": 0.5, "min_side": 2, "max_watermark": None})
    assert list(changed.decide.rules.items()) == [("min_side", 2), ("min_aesthetic", 5), ("max_unsafe", 0.5)]


def test_deciding_again_changes_recipe_and_decisions_and_packing_follows(dataset):
    recipe = with_decide_rules(read_recipe(dataset), {"min_aesthetic": 5.2})
    assert decide_again(dataset, recipe) == ["decide.rules.min_aesthetic: 4.2 -> 5.2"]
    assert read_recipe(dataset) == recipe
    kept = [row for row in pq.read_table(dataset.decisions).to_pylist() if row["reason"] is None]
    assert len(kept) == 3
    assert pending(DECIDE, dataset, recipe) == []
    assert pending(PACK, dataset, recipe) == [0]


def test_where_nothing_would_be_kept_nothing_is_changed(dataset, digests):
    before = digests(dataset)
    with pytest.raises(UserError, match=r"No image .* is kept .*min_side 5"):
        decide_again(dataset, with_decide_rules(read_recipe(dataset), {"min_side": 9999}))
    assert digests(dataset) == before


def test_values_are_read_as_yaml_reads_them():
    rules = parse_rules(["min_side=512", " no_filename_captions = true", "languages=[en, de]"])
    assert rules == {"min_side": 512, "no_filename_captions": True, "languages": ["en", "de"]}


@pytest.mark.parametrize("text", ["num_faces<=2", "num_faces <= 2", "num_faces=<= 2"])
def test_a_rule_on_a_carried_column_is_written_as_a_comparison(text):
    assert parse_rules([text]) == {"num_faces": "<= 2" if " 2" in text else "<=2"}
    assert parse_rules(["num_faces>=1 and < 5", "size==3", "size!=3"]) == {"num_faces": ">=1 and < 5", "size": "!=3"}
    recipe = Recipe(name="r", select=SelectConfig(carry=["num_faces"]))
    assert list(with_decide_rules(recipe, parse_rules([text])).decide.rules) == ["num_faces"]


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("min_sde=5", "unknown rule 'min_sde'. Did you mean 'min_side'?"),
        ("min_side=tall", "rule 'min_side' wants a number, not 'tall'"),
        ("languages=[en]", "move it to `select.rules`"),
        ("min_side", "write name=value"),
        ("min_side=[", "write name=value"),
    ],
)
def test_a_wrong_rule_is_the_sentence_that_a_recipe_gets(dataset, rule, sentence):
    with pytest.raises(UserError) as error:
        with_decide_rules(read_recipe(dataset), parse_rules([rule]))
    assert sentence in str(error.value)


def test_before_the_stages_up_to_it_are_finished_there_is_a_sentence(tmp_path):
    dataset = write_downloads(tmp_path, [Fetched(encoded(scene_image(1)))])
    record_recipe(dataset, Recipe(name="test", select=SelectConfig(metadata="x")))
    with pytest.raises(UserError, match="stage 'score' is not finished"):
        now(dataset, {"min_side": 1})


def test_the_command_prints_both_and_writes_only_without_dry_run(dataset, monkeypatch, capsys, digests):
    def sdtrain(*arguments):
        monkeypatch.setattr(sys, "argv", ["sdtrain", "decide", str(dataset.root), *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        return capsys.readouterr().out

    before = digests(dataset)
    shown = sdtrain("--min-aesthetic", "5.2", "--rule", "min_side=512", "--dry-run")
    assert [line.split()[-2:] for line in shown.splitlines() if " kept " in line] == [["5", "2"]]
    assert shown.endswith("Nothing was written.\n")
    assert digests(dataset) == before
    shown = sdtrain("--min-aesthetic", "5.2", "--rule", "min_side=512")
    assert f"sdtrain build {dataset.recipe} --output {dataset.root}" in shown
    assert read_recipe(dataset).decide.rules == {"min_aesthetic": 5.2, "min_side": 512}


def test_a_rule_of_true_and_false_counts_without_any_other(tmp_path):
    dataset = write_dataset(tmp_path, [row(caption="IMG_1234.jpg"), row(caption="a red house")])
    recipe = Recipe(name="test", decide=DecideConfig(rules={"no_filename_captions": True}))
    (report,) = run_batch(DECIDE, dataset, recipe, [0])
    assert report.dropped == {"no_filename_captions": 1}
