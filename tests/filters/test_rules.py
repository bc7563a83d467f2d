"""Rules: what they say of a row, which values they take, and that bounds never drop a row that passes."""

import math

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.recipe import DecideConfig, load_recipe
from filters.rules import DERIVED, RULES, Rule, derived_sql, explain, reason_case
from filters.select.pushdown import Pushdown, pushdown_sql
from filters.select.schema import column_sql
from filters.select_config import SelectConfig
from sdtrain.errors import UserError

NAN = float("nan")
NAMES = [
    "", "  ", "\n", "IMG_1234.jpg", "IMG_1234", "img 0021", "DSC01234", "DSC_0042.JPG", "_DSC7788", "P1020304",
    "DSCN0001", "image-1", "image", "Image (3)", "photo 2", "x.png", "my-holiday_photo.jpeg", "untitled", "Untitled-2",
    "unnamed", "screenshot 2021-03-04 at 10.11.12", "1234567", "2019-05-04 12:30", "★★★", "IMG-20190504-WA0012.jpg",
    "3f2504e0-4f89-11d3-9a0c-0305e82c3301", "d41d8cd98f00b204e9800998ecf8427e", "https://e.com/a/b.webp",
    "PXL_20230101.heic",
]  # fmt: skip
WORDS = [
    "image of a cat", "a", "Photo by Anna", "Canon EOS 5D", "猫", "кот", "cat.", "Panda", "pictures", "Slide Mountain",
    "an image named cat.jpg on a wall", "defaced", "deadbeef", "Figure skating", "Scandinavia", "1984 by Orwell", "é",
    "Screen door", "file cabinet", "WP theme", "P", "Samantha 2",
]  # fmt: skip


def ask(sql, values=(), **columns):
    """`sql` over a table of the given columns."""
    with duckdb.connect() as connection:
        connection.register("rows", pa.table(columns))
        return [row[0] for row in connection.execute(f"SELECT {sql} FROM rows", list(values)).fetchall()]


@pytest.mark.parametrize(("captions", "are_names"), [(NAMES, True), (WORDS, False)])
def test_captions_that_name_a_file_are_told_from_words(captions, are_names):
    found = ask(derived_sql(["caption_is_name"]), caption=captions)
    assert [caption for caption, is_name in zip(captions, found, strict=True) if is_name != are_names] == []


def test_words_and_characters_are_counted_in_any_script():
    blanks = [chr(code) for code in range(0x3001) if chr(code).isspace()]
    captions = [
        "",
        " ",
        "one",
        " two  words\n",
        "a\u00a0b\u3000c",
        "猫 と 犬",
        "naïve café",
        *(f"a{b}b{b}" for b in blanks),
    ]
    assert ask(derived_sql(["caption_words"]), caption=captions) == [len(caption.split()) for caption in captions]
    assert ask(derived_sql(["caption_chars"]), caption=captions) == [len(caption) for caption in captions]


def test_sizes_that_are_none_have_no_side_and_no_ratio():
    sizes = {"width": [600, 0, -1, None, 100], "height": [300, 300, 300, 300, 1000]}
    assert ask(derived_sql(["side"]), **sizes) == [300, None, None, None, 100]
    assert ask(derived_sql(["aspect_ratio"]), **sizes) == [2.0, None, None, None, 10.0]


@pytest.mark.parametrize(
    ("rule", "value", "column", "rows"),
    [
        ("max_caption_chars", 3.0, "caption_chars", [(3, None), (4, "max_caption_chars")]),
        ("min_caption_chars", 3.0, "caption_chars", [(3, None), (None, "caption_chars_missing")]),
        ("min_caption_words", 2.0, "caption_words", [(2, None), (1, "min_caption_words")]),
        ("max_similarity", 0.3, "similarity", [(0.29, None), (0.3, "max_similarity"), (None, "similarity_missing")]),
        ("min_aesthetic_v1", 7.0, "aesthetic_v1", [(7.5, None), (7.0, "min_aesthetic_v1")]),
        ("no_filename_captions", True, "caption_is_name", [(False, None), (True, "no_filename_captions")]),
        ("no_filename_captions", False, "caption_is_name", [(False, None), (True, None), (None, None)]),
        ("languages", ["EN", "de"], "language", [("en", None), ("De", None), ("fr", "languages")]),
        ("languages", ["en"], "language", [("en", None), (None, "language_missing")]),
        ("nsfw_tags", ["UNLIKELY"], "nsfw", [("UNLIKELY", None), ("unlikely", None), ("NSFW", "nsfw_tags")]),
    ],
)  # fmt: skip
def test_rules_drop_with_their_name_and_missing_values_with_their_column(rule, value, column, rows):
    values, reasons = zip(*rows, strict=True)
    case, bound = reason_case({rule: value})
    assert ask(case, bound, **{column: list(values)}) == list(reasons)


def test_missing_scores_pass_where_they_are_judged_later():
    case, bound = reason_case({"min_aesthetic": 5.0, "max_unsafe": 0.5}, null_passes=["aesthetic"])
    rows = {"aesthetic": [None, 6.0, 4.0, None], "punsafe": [0.1, None, 0.1, 0.9]}
    assert ask(case, bound, **rows) == [None, "punsafe_missing", "min_aesthetic", "max_unsafe"]


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"min_sid": 3}, "unknown rule 'min_sid'. Did you mean 'min_side'"),
        ({"min_side": "big"}, "rule 'min_side' wants a number, not 'big'"),
        ({"min_side": True}, "rule 'min_side' wants a number, not True"),
        ({"min_aesthetic": math.nan}, "wants a number, not nan"),
        ({"languages": "en"}, r"rule 'languages' wants a list of words, such as \[en, de\], not 'en'"),
        ({"languages": []}, "wants a list of words"),
        ({"languages": [1]}, "wants a list of words"),
        ({"no_filename_captions": 1}, "wants true or false, not 1"),
        (["min_side"], "rules are `name: value` lines"),
    ],
)
def test_wrong_rules_are_sentences(tmp_path, rules, words):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"name: mine\nselect: {{rules: {str(rules).replace('True', 'true').replace('nan', '.nan')}}}\n")
    with pytest.raises(UserError, match=rf"mine.yaml: 'select.rules' is .*{words}"):
        load_recipe(str(recipe))


def test_values_keep_their_kind_and_the_rules_their_order():
    rules = {"nsfw_tags": ["UNLIKELY"], "min_side": 1, "no_filename_captions": True, "min_aesthetic": 5.5}
    found = SelectConfig(rules=rules).rules
    assert list(found.items()) == list(rules.items())
    assert [type(value) for value in found.values()] == [list, float, bool, float]


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if not rule.in_decide])
def test_rules_that_only_the_metadata_can_answer_are_refused_in_decide(rule):
    with pytest.raises(ValueError, match=f"rule '{rule}' looks at column .* move it to `select.rules`"):
        DecideConfig(rules={rule: ["en"] if RULES[rule].kind is list else 1})


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (("loudness", "loudness < ?", "loud"), "no table is known to have loudness: add it to filters.columns"),
        (("side", "side < 9", "large"), "needs one `\\?` for its value"),
        (("caption", "caption <> ?", "empty", bool), "needs one `\\?` for its value, and none for a bool"),
        (("side", "side < ?", "large", int), "the rule on column 'side'"),
    ],
)
def test_incomplete_rules_are_refused_where_they_are_declared(rule, words):
    with pytest.raises(ValueError, match=words):
        Rule(*rule)


def test_reasons_are_told_in_words_with_their_value():
    rules = {"min_side": 512.0, "languages": ["en", "de"], "no_filename_captions": True}
    assert explain("min_side", rules) == "shorter side under 512 px"
    assert explain("languages", rules) == "language not one of en, de"
    assert "name of a file" in explain("no_filename_captions", rules)
    assert explain("aesthetic_missing", rules) == "no value for aesthetic"


FLOATS = st.sampled_from([0.0, 0.1, 0.3, 0.5, 5.0, 511.2, 512.0, 513.7, -1.0]) | st.floats(-600, 600)
RAW = {
    "INTEGER": (pa.int32(), st.integers(-600, 600)),
    "BIGINT": (pa.int64(), st.integers(-600, 600) | st.sampled_from([2**40, -(2**40)])),
    "TINYINT": (pa.int8(), st.integers(-128, 127)),
    "FLOAT": (pa.float32(), (FLOATS | st.sampled_from([NAN, math.inf, -math.inf])).map(lambda x: float(np.float32(x)))),
    "DOUBLE": (pa.float64(), FLOATS | st.sampled_from([NAN, math.inf, -math.inf])),
    "VARCHAR": (pa.string(), FLOATS.map(str)),
}
COLUMNS = {"min_side": ("width", "height"), "min_aesthetic": ("aesthetic",), "max_watermark": ("pwatermark",)}


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(RAW)), rule=st.sampled_from(sorted(COLUMNS)), value=FLOATS)
def test_bounds_hold_for_every_row_that_passes_whatever_the_type(data, kind, rule, value):
    arrow, raw = RAW[kind]
    null_passes = data.draw(st.sampled_from([(), (RULES[rule].column,)]))
    value = float(data.draw(raw)) if kind == "FLOAT" and data.draw(st.booleans()) else value
    value = value if math.isfinite(value) else 0.0
    rows = data.draw(st.lists(raw | st.none() | st.just(str(value) if kind == "VARCHAR" else None), max_size=20))
    columns = {name: f'"{name.upper()}"' for name in COLUMNS[rule]}
    types = dict.fromkeys(columns, kind)
    condition, bound = pushdown_sql(Pushdown({rule: value}, null_passes), columns, types)
    ours = ", ".join(f"{column_sql(name, sql, kind)} AS {name}" for name, sql in columns.items())
    case, values = reason_case({rule: value}, null_passes=null_passes)
    side = f", {derived_sql(['side'])}" if rule == "min_side" else ""
    with duckdb.connect() as connection:
        connection.register("raw", pa.table({name.upper(): pa.array(rows, arrow) for name in columns}))
        read = f"SELECT {ours}, {condition} AS held FROM raw"
        judged = f"SELECT {case} IS NULL AS passes, held FROM (SELECT *{side} FROM ({read}))"
        found = connection.execute(judged, [*values, *bound]).fetchall()
    assert all(held for passes, held in found if passes)
    if kind != "VARCHAR" and not null_passes and rule != "min_side":  # and they are no looser than the rule
        assert all(
            passes or not held for (passes, held), row in zip(found, rows, strict=True) if row and math.isfinite(row)
        )


@pytest.mark.parametrize("sql", ["length({url})", "length({caption}) / length({url})", "length(caption)"])
def test_a_derived_column_names_what_every_stage_fills_in(monkeypatch, sql):
    monkeypatch.setitem(DERIVED, "mine", sql)
    with pytest.raises(
        ValueError, match=r"DERIVED\['mine'\] must name one or more of \{width\}, \{height\}, \{caption\}"
    ):
        Rule("mine", "mine > ?", "mine")
