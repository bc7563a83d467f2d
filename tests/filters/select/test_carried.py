"""A user's own columns: carried into selection, views and packed JSON, and usable in rules."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from filters.caption.stage import CAPTION
from filters.columns import RESERVED
from filters.decide.funnel import funnel
from filters.decide.stage import decide
from filters.inspect.query import ask
from filters.inspect.views import write_views
from filters.pipeline import STAGES, stages_of
from filters.recipe import Recipe
from filters.recipe_record import read_recipe, record_recipe
from filters.rules import explain
from filters.select.stage import SELECT
from filters.select_config import SelectConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.errors import UserError
from sdtrain.pack.plan import PROVENANCE
from tests.filters.removal_fixtures import caption_of, make_recipe, members_of, url_of
from tests.filters.select.metadata_fixtures import rows_of, select, url, write

OWN = {
    "num_faces": [0, 1, 2, None, 5, 3],
    "License": ["CC0", "by", None, "by-nc", "cc0", "by"],
    "share": [0.5, None, 1.25, 0.25, 1.0, 0.0],
    "is ok": [True, False, True, None, True, True],
    "code": ["007", "008", "1", "2", "3", "4"],
}
CARRY = list(OWN)
URLS = {"URL": [url(i) for i in range(6)], "TEXT": ["t"] * 6}


def own_of(dataset):
    return {row["url"]: {name: row[name] for name in CARRY} for row in rows_of(dataset)}


def test_columns_keep_their_values_and_types_and_come_the_same_from_text(tmp_path):
    write(tmp_path / "metadata" / "a.parquet", **URLS, **OWN)
    dataset, report = select(tmp_path, carry=CARRY)
    assert own_of(dataset) == {url(i): {name: OWN[name][i] for name in CARRY} for i in range(6)}
    schema = pq.read_schema(dataset.selection(0))
    assert [schema.field(name).type for name in CARRY] == [
        pa.int64(),
        pa.string(),
        pa.float64(),
        pa.bool_(),
        pa.string(),
    ]
    rows = [{name: values[i] for name, values in (URLS | OWN).items()} for i in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = [",".join(rows[0])] + [",".join("" if v is None else str(v) for v in row.values()) for row in rows]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    for name in ("a.jsonl", "a.csv"):
        _, again = select(tmp_path, name + "-data", metadata=str(tmp_path / name), carry=CARRY, num_threads=1)
        assert again.outputs == report.outputs, name


def test_files_of_several_types_get_one_that_holds_all_and_a_file_may_lack_a_column(tmp_path):
    write(tmp_path / "metadata" / "a.parquet", URL=[url(1)], TEXT=["t"], size=pa.array([3], pa.int16()), mark=["x"])
    write(tmp_path / "metadata" / "b.parquet", URL=[url(2)], TEXT=["t"], SIZE=[float("inf")], mark=[7])
    write(tmp_path / "metadata" / "c.parquet", URL=[url(3)], TEXT=["t"])
    dataset, _ = select(tmp_path, carry=["size", "mark"])
    found = {row["url"]: (row["size"], row["mark"]) for row in rows_of(dataset)}
    assert found == {url(1): (3.0, "x"), url(2): (None, "7"), url(3): (None, None)}


@pytest.mark.parametrize(
    ("rule", "value", "passing", "dropped"),
    [
        ("num_faces", "<= 2", [0, 1, 2], {"num_faces_missing": 1, "num_faces": 2}),
        ("num_faces", ">= 1 and < 5", [1, 2, 5], {"num_faces_missing": 1, "num_faces": 2}),
        ("num_faces", "!= 0", [1, 2, 4, 5], {"num_faces_missing": 1, "num_faces": 1}),
        ("share", "> 0.25", [0, 2, 4], {"share_missing": 1, "share": 2}),
        ("License", ["cc0", "BY"], [0, 1, 4, 5], {"License_missing": 1, "License": 1}),
        ("is ok", True, [0, 2, 4, 5], {"is ok_missing": 1, "is ok": 1}),
        ("code", "== 7", [0], {"code": 5}),
    ],
)
def test_rules_look_at_carried_columns(tmp_path, rule, value, passing, dropped):
    write(tmp_path / "metadata" / "a.parquet", **URLS, **OWN)
    dataset, report = select(tmp_path, carry=CARRY, rules={rule: value})
    assert sorted(own_of(dataset)) == [url(i) for i in passing]
    assert report.dropped == dropped


def test_a_reason_is_explained_and_a_text_fails_a_comparison():
    assert explain("num_faces", {"num_faces": "<= 2"}) == "num_faces not <= 2"
    assert explain("License", {"License": ["cc0", "by"]}) == "License not one of cc0, by"
    assert explain("num_faces_missing", {"num_faces": "<= 2"}) == "no value for num_faces"


def test_a_word_where_a_number_is_compared_drops_the_row(tmp_path):
    (tmp_path / "a.csv").write_text(f"url,caption,n\n{url(1)},t,1\n{url(2)},t,many\n")
    dataset, report = select(tmp_path, metadata=str(tmp_path / "a.csv"), carry=["n"], rules={"n": "< 3"})
    assert ([row["n"] for row in rows_of(dataset)], report.dropped) == (["1"], {"n": 1})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"carry": ["num_faces", "NUM_FACES"]}, "'NUM_FACES' is there twice"),
        ({"carry": ["Caption"]}, "'Caption' is a column of our own tables"),
        ({"carry": ["sha256"]}, "'sha256' is a column of our own tables"),
        ({"carry": ["min_side"]}, "'min_side' is the name of a rule"),
        ({"carry": ['a"b']}, "cannot be a column"),
        ({"carry": [""]}, "cannot be a column"),
        ({"rules": {"num_faces": "<= 2"}}, "unknown rule 'num_faces'.* needs it in select.carry"),
        ({"carry": ["n"], "rules": {"n": 2}}, "rule 'n', on a carried column, wants a comparison"),
        ({"carry": ["n"], "rules": {"n": "<= two"}}, "rule 'n', on a carried column, wants a comparison"),
        ({"carry": ["n"], "rules": {"n": "<= 2; DROP"}}, "rule 'n', on a carried column, wants a comparison"),
    ],
)
def test_mistakes_in_a_recipe_are_sentences(settings, words):
    with pytest.raises(ValueError, match=words):
        SelectConfig(**settings)


def test_rules_of_decide_know_the_carried_columns():
    assert Recipe(name="r", select={"carry": ["n"]}, decide={"rules": {"n": "> 1"}}).decide.rules == {"n": "> 1"}
    with pytest.raises(ValueError, match=r"unknown rule 'n'.* needs it in select.carry"):
        Recipe(name="r", decide={"rules": {"n": "> 1"}})
    with pytest.raises(ValueError, match=r"unknown rule 'min_sid'. Did you mean 'min_side'"):
        Recipe(name="r", decide={"rules": {"min_sid": 3}})


def test_a_column_that_is_missing_or_nested_is_named_before_anything_is_read(tmp_path):
    write(tmp_path / "metadata" / "a.parquet", **URLS, num_faces=[1] * 6, boxes=[[1]] * 6)
    with pytest.raises(UserError, match=r"no column num_face\. Did you mean 'num_faces'\? It has: URL, TEXT"):
        select(tmp_path, carry=["num_face"])
    with pytest.raises(UserError, match=r"column boxes of .*a\.parquet holds lists or objects"):
        select(tmp_path, carry=["boxes"])


def test_no_column_of_our_tables_can_be_a_users_own():
    # The captions' columns never lie beside a user's: their table is joined with no selection.
    ours = {column for stage in STAGES if stage.table and stage is not CAPTION for column in stage.table.columns}
    assert {column.lower() for column in ours | set(PROVENANCE)} <= RESERVED


def test_the_fingerprint_changes_with_the_columns_only(tmp_path):
    write(tmp_path / "metadata" / "a.parquet", **URLS, **OWN)
    dataset, recipe = DatasetDir(tmp_path / "data"), Recipe(name="r", select={"metadata": str(tmp_path / "metadata")})
    run_batch(SELECT, dataset, recipe, [0])
    for settings in ({"carry": []}, {"columns": {}}):
        same = recipe.select.model_copy(update=settings)
        assert pending(SELECT, dataset, recipe.model_copy(update={"select": same})) == []
    for settings in ({"carry": ["share"]}, {"columns": {"caption": "License"}}):
        other = recipe.select.model_copy(update=settings)
        assert pending(SELECT, dataset, recipe.model_copy(update={"select": other})) == [0]


def test_they_reach_decisions_views_and_the_json_of_packed_samples(photo_site, tmp_path):
    port, numbers = photo_site[1], [0, 1, 2, 4, 5, 6, 8, 9]
    rows = [{"image_url": url_of(n, port), "raw_caption": caption_of(n), "num_faces": n, "by": "me"} for n in numbers]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns, rules = {"url": "image_url", "caption": "raw_caption"}, {"num_faces": "< 9"}
    own = {"columns": columns, "carry": ["num_faces", "by"], "rules": rules, "samples_per_shard": 4}
    recipe = make_recipe(
        tmp_path / "rows.jsonl",
        select={"metadata": str(tmp_path / "rows.jsonl")} | own,
        decide={"rules": {"num_faces": "!= 5"}},
        duplicates={"level": "off"},
    )
    dataset = DatasetDir(tmp_path / "data")
    record_recipe(dataset, recipe)
    for stage in stages_of(recipe)[:-1]:
        run_batch(stage, dataset, recipe, pending(stage, dataset, recipe))
    assert read_recipe(dataset).select == recipe.select
    packed = [
        json.loads(body) for name, body in members_of(dataset).items() if name[-5:] == ".json" and "dataset/" in name
    ]
    expected = {caption_of(n): (n, "me") for n in (0, 1, 2, 4, 6, 8)}
    assert {sample["caption"]: (sample["num_faces"], sample["by"]) for sample in packed} == expected
    write_views(dataset, recipe)
    with ask(dataset, 'SELECT caption, num_faces, "by" FROM kept') as answer:
        assert {row["caption"]: (row["num_faces"], row["by"]) for row in answer.read_all().to_pylist()} == expected
    with ask(dataset, "SELECT reason, count(*) AS num FROM decisions GROUP BY 1 ORDER BY 1") as answer:
        assert answer.read_all().to_pylist() == [{"reason": "num_faces", "num": 1}, {"reason": None, "num": 6}]
    assert any(
        row["reason"] == "num_faces" and row["meaning"] == "num_faces not < 9"
        for row in funnel(dataset, recipe, STAGES)
    )
    less = recipe.select.model_copy(update={"carry": ["by"], "rules": {}})
    other = recipe.model_copy(update={"select": less})
    run_batch(SELECT, dataset, other, [0])
    with pytest.raises(UserError, match=r"num_faces is no column of .*: name it in select\.carry"):
        decide(dataset, other)
