from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters import rules as known_rules
from filters.decide.stage import DECIDE, decide
from filters.recipe import DecideConfig, Recipe
from filters.select_config import SelectConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, write_entry
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.errors import UserError
from tests.filters.dataset_fixtures import make_dataset
from tests.image_fixtures import Fetched, write_downloads

SCORE_NAMES = ("aesthetic", "pwatermark", "punsafe", "similarity")
_OURS = (*SCORE_NAMES, "aesthetic_v1", "contrast")
_SCORES = pa.schema(
    [("uid", pa.string()), ("key", pa.string()), *((n, pa.float32()) for n in _OURS), ("reason", pa.string())]
)
_DUPLICATES = pa.schema([(name, pa.string()) for name in ("uid", "group_id", "kind")])

# A row: what was fetched, our own scores (None: damaged), the number of its group of copies and their kind.
Row = tuple[Fetched, dict[str, float] | None, int | None, str]


def write_dataset(root: Path, rows: list[Row], per_shard: int = 4) -> DatasetDir:
    """A dataset that is finished up to `dedup`."""
    dataset = write_downloads(root, [fetched for fetched, *_ in rows], per_shard)
    selected = selection(dataset)
    scores: dict[int, list[dict[str, Any]]] = {i // per_shard: [] for i in range(len(rows))}
    groups: dict[int, list[int]] = {}
    for i, ((fetched, ours, group, _), row) in enumerate(zip(rows, selected, strict=True)):
        if fetched.image is None:
            continue
        names = {name: row[name] for name in ("uid", "key")}
        scores[i // per_shard].append(names | ({"reason": "undecodable"} if ours is None else ours))
        if ours is not None and group is not None:
            groups.setdefault(group, []).append(i)
    for shard, table in scores.items():
        damaged = sum("reason" in row for row in table)
        finish(dataset, "score", shard, dataset.scores(shard), table, _SCORES, {"undecodable": damaged})
    copies = [
        {"uid": selected[i]["uid"], "group_id": min(selected[j]["uid"] for j in members), "kind": rows[i][3]}
        for members in groups.values()
        if len(members) > 1
        for i in members
    ]
    finish(dataset, "dedup", 0, dataset.duplicates, copies, _DUPLICATES, {})
    return dataset


def finish(dataset, stage, shard, path, rows, schema, dropped) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    counts = {"num_in": len(rows), "num_out": len(rows) - sum(dropped.values()), "dropped": dropped}
    report = {"stage": stage, "shard": shard, "outputs": describe_outputs(dataset, [path])}
    write_entry(dataset, ShardReport.model_validate(report | counts))


def selection(dataset: DatasetDir) -> list[dict[str, Any]]:
    files = sorted(dataset.selection(0).parent.glob("*.parquet"))
    return [row for path in files for row in pq.read_table(path).to_pylist()]


def decided(dataset: DatasetDir, **config: Any) -> list[str | None]:
    """The reasons in the order of the rows."""
    run_batch(DECIDE, dataset, Recipe(name="test", decide=DecideConfig(**config)), [0])
    return pq.read_table(dataset.decisions)["reason"].to_pylist()


GOOD = {"aesthetic": 6.0, "pwatermark": 0.1, "punsafe": 0.1, "similarity": 0.3}


def row(ours: dict[str, float] | None = GOOD, group: int | None = None, kind: str = "exact", **fetched: Any) -> Row:
    return Fetched(**({"image": b"x", "scores": GOOD} | fetched)), ours, group, kind


def expected_reasons(rows: list[Row], uids: list[str], config: DecideConfig) -> list[str | None]:
    """The same decisions in plain Python."""
    reasons = [_rule_reason(*row[:2], config) for row in rows]
    for group in {row[2] for row in rows if row[2] is not None}:
        members = [i for i, row in enumerate(rows) if row[2] == group and row[0].image and row[1] is not None]
        passed = [i for i in members if reasons[i] is None]
        if len(members) > 1 and passed:
            best = min(passed, key=lambda i: (-_area(rows[i]), -_aesthetic(rows[i], config), uids[i]))
            for i in passed:
                reasons[i] = None if i == best else f"duplicate_{rows[i][3]}"
    return reasons


def _area(row: Row) -> int:
    width, height = row[0].original_px or (0, 0)
    return width * height


def _aesthetic(row: Row, config: DecideConfig) -> float:
    scores = (row[0].scores if config.decide_by == "metadata" else row[1]) or {}
    value = scores.get("aesthetic")
    return float("-inf") if value is None else value


def _rule_reason(fetched: Fetched, ours: dict[str, float] | None, config: DecideConfig) -> str | None:
    if fetched.image is None:
        return fetched.reason
    if ours is None:
        return "undecodable"
    width, height = fetched.original_px or (0, 0)
    known: dict[str, Any] = dict(fetched.scores or {} if config.decide_by == "metadata" else ours)
    known |= {"side": min(width, height), "aspect_ratio": max(width, height) / min(width, height)}
    known["caption_chars"] = None if fetched.caption is None else len(fetched.caption)
    for name, limit in config.rules.items():
        column, passes = RULES[name]
        if known.get(column) is None:
            return f"{column}_missing"
        if not passes(known[column], limit):
            return name
    return None


RULES: dict[str, Any] = {
    "min_side": ("side", lambda value, limit: value >= limit),
    "min_aesthetic": ("aesthetic", lambda value, limit: value > limit),
    "max_watermark": ("pwatermark", lambda value, limit: value < limit),
    "max_unsafe": ("punsafe", lambda value, limit: value < limit),
    "min_similarity": ("similarity", lambda value, limit: value > limit),
    "max_aspect_ratio": ("aspect_ratio", lambda value, limit: value <= limit),
    "min_caption_chars": ("caption_chars", lambda value, limit: value >= limit),
}

# Few different values, exact in float32, so that rules often meet their own limit.
_VALUES = {n: st.sampled_from([0.0, 0.25, 0.5, 1.0, 5.0]) for n in SCORE_NAMES}
_SOME_SCORES = st.fixed_dictionaries(_VALUES) | st.fixed_dictionaries({}, optional=_VALUES)
_SOME_SIZES = st.tuples(st.sampled_from([100, 256, 512]), st.sampled_from([100, 256, 512]))
# As a rule there is an image, of one group of two, so that copies pass the rules together.
_FETCHED = st.one_of(
    st.builds(
        Fetched,
        image=st.just(b"x"),
        caption=st.sampled_from([None, "", "a", "ein Bär"]),
        original_px=_SOME_SIZES,
        scores=_SOME_SCORES,
    ),
    st.sampled_from([Fetched(b"x", scores=GOOD), *(Fetched(None, reason=r) for r in ("http_404", "timeout"))]),
)
_ROWS = st.lists(
    st.tuples(
        _FETCHED,
        _SOME_SCORES | st.sampled_from([None, GOOD, GOOD]),
        st.sampled_from([0, 0, 1, None]),
        st.sampled_from(["exact", "perceptual"]),
    ),
    min_size=2,
    max_size=12,
)
_CONFIGS = st.builds(
    DecideConfig,
    decide_by=st.sampled_from(["metadata", "image"]),
    rules=st.lists(st.sampled_from(sorted(RULES)), unique=True, max_size=4).flatmap(
        lambda names: st.fixed_dictionaries({n: st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 256.0]) for n in names})
    ),
)


@settings(max_examples=50, deadline=None)
@given(rows=_ROWS, config=_CONFIGS)
def test_any_rules_on_any_rows_decide_as_plain_python_does_and_lose_no_row(rows, config):
    with TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder), rows)
        counts = decide(dataset, Recipe(name="test", decide=config), dataset.decisions)
        first = dataset.decisions.read_bytes()
        decide(dataset, Recipe(name="test", decide=config), dataset.decisions)
        assert dataset.decisions.read_bytes() == first
        decisions = pq.read_table(dataset.decisions).to_pylist()
        selected = selection(dataset)
    assert sum(counts.values()) == len(rows)
    assert [d["key"] for d in decisions] == [s["key"] for s in selected]
    assert [d["uid"] for d in decisions] == [s["uid"] for s in selected]
    assert [d["shard"] for d in decisions] == [i // 4 for i in range(len(rows))]
    reasons = [d["reason"] for d in decisions]
    assert reasons == expected_reasons(rows, [s["uid"] for s in selected], config)
    assert Counter(reasons) == counts


def test_the_first_reason_counts_download_before_decoding_before_rules_before_copies(tmp_path):
    rows = [
        row(group=0, original_px=(600, 600)),
        row(image=None, reason="timeout", original_px=(10, 10)),
        row(ours=None, original_px=(10, 10)),
        row(original_px=(10, 600), group=0),
        row(group=0, original_px=(500, 600)),
        row(scores=GOOD | {"aesthetic": 4.0}),
    ]
    reasons = decided(write_dataset(tmp_path, rows), rules={"min_side": 100, "min_aesthetic": 5})
    assert reasons == [None, "timeout", "undecodable", "min_side", "duplicate_exact", "min_aesthetic"]


def test_of_copies_the_largest_original_stays_then_the_best_liked_then_the_smallest_uid(tmp_path):
    liked = GOOD | {"aesthetic": 7.0}
    rows = [
        *(row(group=0, original_px=px) for px in ((600, 600), (700, 600), (500, 900))),
        *(row(group=1, scores=scores) for scores in (GOOD, liked, {})),
        *(row(group=2) for _ in range(3)),
    ]
    dataset = write_dataset(tmp_path, rows)
    reasons, uids = decided(dataset), [s["uid"] for s in selection(dataset)]
    assert [i for i in range(6) if reasons[i] is None] == [2, 4]
    assert [uid for uid, reason in zip(uids[6:], reasons[6:], strict=True) if reason is None] == [min(uids[6:])]


def test_a_copy_stays_when_the_larger_one_breaks_a_rule(tmp_path):
    rows = [row(group=0, original_px=(3000, 600)), row(group=0, original_px=(600, 600))]
    assert decided(write_dataset(tmp_path, rows), rules={"max_aspect_ratio": 2}) == ["max_aspect_ratio", None]


def test_scores_come_from_the_metadata_or_from_the_image_as_the_recipe_says(tmp_path):
    rows = [row(ours=GOOD | {"aesthetic": 3.0}), row(scores=GOOD | {"aesthetic": 3.0}), row(scores={})]
    dataset = write_dataset(tmp_path, rows)
    assert decided(dataset, rules={"min_aesthetic": 5}) == [None, "min_aesthetic", "aesthetic_missing"]
    assert decided(dataset, rules={"min_aesthetic": 5}, decide_by="image") == ["min_aesthetic", None, None]


def test_decide_does_nothing_twice_and_a_rerun_gives_the_same_bytes(tmp_path, digests):
    dataset = write_dataset(tmp_path, [row(group=i % 3) for i in range(9)])
    recipe = Recipe(name="test", decide=DecideConfig(rules={"min_side": 512}))
    (report,) = run_batch(DECIDE, dataset, recipe, [0])
    assert (report.num_in, report.num_out, report.dropped) == (9, 3, {"duplicate_exact": 6})
    assert pending(DECIDE, dataset, recipe) == []
    before = digests(dataset)
    run_batch(DECIDE, dataset, recipe, [0])
    assert digests(dataset) == before


@pytest.mark.parametrize("config", [{"rules": {"min_side": 511}}, {"decide_by": "image", "rules": {"min_side": 512}}])
def test_other_rules_make_the_decision_pending_again(tmp_path, config):
    dataset = write_dataset(tmp_path, [row(), row()])
    decided(dataset, rules={"min_side": 512})
    assert pending(DECIDE, dataset, Recipe(name="test", decide=DecideConfig(**config))) == [0]


def test_another_order_of_the_rules_makes_the_decision_pending_again(tmp_path):
    dataset = write_dataset(tmp_path, [row(), row()])
    decided(dataset, rules={"min_side": 512, "min_aesthetic": 5})
    other = DecideConfig(rules={"min_aesthetic": 5, "min_side": 512})
    assert pending(DECIDE, dataset, Recipe(name="test", decide=other)) == [0]


def test_other_scores_in_the_metadata_make_the_decision_pending_again(tmp_path):
    fetched, *rest = row()
    dataset = write_dataset(tmp_path, [(fetched, *rest), (fetched, *rest)])
    decided(dataset, rules={"min_aesthetic": 5})
    changed = replace(fetched, scores=GOOD | {"aesthetic": 1.0})
    write_dataset(tmp_path, [(fetched, *rest), (changed, *rest)])
    recipe = Recipe(name="test", decide=DecideConfig(rules={"min_aesthetic": 5}))
    assert pending(DECIDE, dataset, recipe) == [0]


def test_when_nothing_is_left_a_sentence_says_why_and_nothing_is_written(tmp_path):
    dataset = write_dataset(tmp_path, [row(), row(), row(image=None, reason="http_404")])
    with pytest.raises(UserError, match=r"No image .* is kept \(http_404 1, min_side 2\)\. Loosen"):
        decided(dataset, rules={"min_side": 5000})
    assert not dataset.decisions.exists()
    assert not list(tmp_path.glob(".*"))


def test_decisions_open_in_duckdb_with_the_promised_columns(tmp_path):
    dataset = write_dataset(tmp_path, [row(), row()])
    decided(dataset)
    with duckdb.connect() as connection:
        described = connection.execute("DESCRIBE SELECT * FROM read_parquet(?)", [str(dataset.decisions)]).fetchall()
    expected = [("uid", "VARCHAR"), ("key", "VARCHAR"), ("shard", "INTEGER"), ("reason", "VARCHAR")]
    assert [(name, kind) for name, kind, *_ in described] == expected


def test_caption_rules_are_judged_after_the_download_too(tmp_path):
    captions = ["IMG_1234.jpg", "two words", "one", "", "a very long caption"]
    dataset = write_dataset(tmp_path, [row(caption=caption) for caption in captions])
    rules = {"no_filename_captions": True, "min_caption_words": 2, "max_caption_chars": 12}
    names = ["no_filename_captions", None, "min_caption_words", "no_filename_captions", "max_caption_chars"]
    assert decided(dataset, rules=rules) == names


def test_scores_of_the_first_predictor_come_from_where_the_recipe_says(tmp_path):
    rows = [row(ours=GOOD | {"aesthetic_v1": 8.0}), row(ours=GOOD | {"aesthetic_v1": 6.0}), row()]
    dataset = write_dataset(tmp_path, rows)
    judged = decided(dataset, rules={"min_aesthetic_v1": 7, "min_aesthetic": 5}, decide_by="image")
    assert judged == [None, "min_aesthetic_v1", "aesthetic_v1_missing"]
    with pytest.raises(UserError, match=r"first predictor, which the metadata of .* do not have\. Set decide.d"):
        decided(dataset, rules={"min_aesthetic_v1": 7})


@pytest.mark.parametrize(
    ("rule", "limit", "kinds", "in_select", "in_decide"),
    [
        (("hash", "hash >= ?", "hash under {value}"), 0, {}, True, False),  # only the metadata has it
        (("caption", "caption <> ''", "no caption", bool), True, {"caption": ("a", "")}, True, True),
        (("width", "width >= ?", "narrower than {value} px"), 64, {"original_px": ((64, 48), (48, 64))}, True, True),
        (("commas", "commas <= ?", "over {value} commas"), 1, {"caption": ("a, b", "a, b, c")}, True, True),
        (("punsafe", "punsafe >= ?", "too safe"), 0.2, {"ours": ({"punsafe": 0.3}, {"punsafe": 0.1})}, True, True),
        (("contrast", "contrast <= ?", "loud"), 0.3, {"ours": ({"contrast": 0.1}, {"contrast": 0.4})}, False, True),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_new_rule_on_any_kind_of_column_works_where_its_column_is_known_and_is_refused_elsewhere(
    tmp_path, monkeypatch, rule, limit, kinds, in_select, in_decide
):
    monkeypatch.setitem(known_rules.DERIVED, "commas", "length({caption}) - length(replace({caption}, ',', ''))")
    monkeypatch.setitem(known_rules.RULES, "mine", known_rules.Rule(*rule))
    rules = {"mine": limit}
    if in_select:
        SelectConfig(rules=rules)
    else:
        with pytest.raises(ValueError, match=r"only a decoded image has; move it to `decide\.rules`"):
            SelectConfig(rules=rules)
    if not in_decide:
        with pytest.raises(ValueError, match=r"only the metadata has; move it to `select\.rules`"):
            DecideConfig(rules=rules)
        return
    [(name, values)] = kinds.items()
    dataset = write_dataset(tmp_path, [row(**{name: value}) for value in values])
    assert decided(dataset, rules=rules, decide_by="image") == [None, "mine"]


def test_tables_of_versions_with_other_columns_are_read_together(tmp_path):
    """A score that the first shard was made without is missing there, and known of the others."""
    dataset, recipe = make_dataset(tmp_path)
    recipe = recipe.model_copy(update={"decide": DecideConfig(decide_by="image", rules={"min_similarity": 0.3})})
    for shard in (1, 2):
        scores = pq.read_table(dataset.scores(shard))
        pq.write_table(
            scores.add_column(0, "similarity", pa.array([0.25 + shard / 10] * len(scores))), dataset.scores(shard)
        )
    images = pq.read_table(dataset.images_table(2))
    pq.write_table(images.drop_columns(["phash"]).append_column("later", [[1] * len(images)]), dataset.images_table(2))
    missing, whole = decide(dataset, recipe), [pq.read_table(dataset.scores(shard)) for shard in range(3)]
    sound = [table["reason"].null_count for table in whole]
    assert missing["similarity_missing"] == sound[0]
    assert missing[None] == sum(sound[1:]), "0.35 and 0.45 are enough"


@pytest.mark.parametrize("table", [DatasetDir.images_table, DatasetDir.scores, DatasetDir.selection])
def test_a_missing_table_is_a_sentence(tmp_path, table):
    dataset, recipe = make_dataset(tmp_path)
    table(dataset, 1).unlink()
    with pytest.raises(UserError, match=r"00001\.parquet cannot be read.*Run the build again"):
        decide(dataset, recipe)


def test_tables_without_a_column_that_a_rule_names_are_a_sentence(tmp_path):
    dataset, recipe = make_dataset(tmp_path)
    by_image = DecideConfig(decide_by="image", rules={"min_similarity": 0.3})
    with pytest.raises(UserError, match=r"cannot be read as they must be for decisions \(.*similarity"):
        decide(dataset, recipe.model_copy(update={"decide": by_image}))
