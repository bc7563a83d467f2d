"""Counts of captions and hosts before and after each filter, of rows whose counts are known."""

import json

import duckdb
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from sdtrain.cli import app
from sdtrain.errors import UserError
from sdtrain.model_card import measure_representation, representation, write_card
from sdtrain.model_card.representation import NO_COUNTRY, measure
from sdtrain.model_card.representation_record import _deviation, read_representation
from sdtrain.model_card.word_lists import (
    NO_LETTERS,
    OWN,
    UNDETERMINED,
    WordLists,
    language_sql,
    load_word_lists,
    words_sql,
)
from tests.sdtrain.model_card.caption_tables import write_tables
from tests.sdtrain.model_card.test_model_card import make_run, write_dataset

GONE, SMALL, COPY = ("http_404", "http_404: Not Found"), ("min_side", None), ("duplicate_exact", None)
KEPT = (None, None)
ROWS = [
    ("https://a.de/1.jpg", "A woman doctor in the clinic", *KEPT),
    ("https://me@b.co.uk:80/2.jpg", "Woman's hat, for women", *SMALL),
    ("https://B.CO.UK/3.jpg", "the WOMEN of Ghana", *GONE),
    ("http://10.0.0.1/4.jpg", "a man, and his dog", *KEPT),
    ("http://c.com/x.de/5.jpg", "mankind", *COPY),
    ("http://c.photography/6.jpg", "Ein Bär mit Hut und Schal", *KEPT),
    ("http://c.jp./7.jpg", "赤い花の写真", *KEPT),
    ("http://c.jp/8.jpg", "", *SMALL),
]


def counts(found, name):
    return next(one.nums for one in found if one.name == name)


@pytest.fixture
def root(tmp_path):
    write_dataset(tmp_path / "data")
    write_tables(tmp_path / "data", ROWS, rows_a_shard=3)
    return tmp_path / "data"


def test_each_step_from_the_selection_to_the_kept_is_counted(root):
    found = measure(write_tables(root, ROWS, 3), "x", load_word_lists())
    assert [(one.name, *one.nums) for one in found.levels] == [
        ("selected", 8),
        ("downloaded", 7),
        ("after min_side", 5),  # first, as in the dataset's funnel, though not in the alphabet
        ("kept", 4),
    ]
    assert counts(found.groups["gender"], "women") == (3, 2, 1, 1)
    assert counts(found.groups["gender"], "men") == (1, 1, 1, 1)  # whole words: not mankind
    assert counts(found.groups["profession"], "doctors") == (1, 1, 1, 1)
    assert found.crossed["doctors"] == {"captions": 1, "men": 0, "other genders": 0, "women": 1}
    assert not found.is_sample
    assert found.num_rows == found.num_measured == 8


def test_hosts_have_the_country_of_their_last_label(root):
    found = measure(write_tables(root, ROWS, 3), "x", load_word_lists())
    named = {one.name: one.nums[0] for one in found.countries}
    assert named == {"uk": 2, "jp": 2, "de": 1, NO_COUNTRY: 3}
    assert found.countries[0].name == NO_COUNTRY  # the most frequent first


@pytest.mark.parametrize(
    ("caption", "language"),
    [
        ("The red fox in a forest", "English"),
        ("ein Bär mit Hut", "German"),
        ("le chat de la maison", "French"),
        ("赤い花", "Japanese"),
        ("红色的花", "Chinese"),
        ("빨간 꽃", "Korean"),
        ("قطة حمراء", "Arabic script"),
        ("кошка из дома что", "Russian"),
        ("красный цветок", "Cyrillic script"),
        ("the Ω sign of Ohm", "English"),
        ("Nike Shoes Red 42", UNDETERMINED),
        ("DSC_0042 2019", UNDETERMINED),
        ("12 345", NO_LETTERS),
        ("", NO_LETTERS),
    ],
)
def test_languages_are_told_by_script_and_little_words(caption, language):
    sql, bound = language_sql(load_word_lists())
    captions = f"SELECT caption, {words_sql()} AS words FROM (SELECT $caption AS caption)"
    assert duckdb.execute(f"SELECT {sql} FROM ({captions})", bound | {"caption": caption}).fetchone() == (language,)


def test_of_a_large_dataset_some_shards_are_read_and_always_the_same(root, monkeypatch):
    monkeypatch.setattr(representation, "MAX_ROWS", 6)
    dataset = write_tables(root, ROWS, 3)
    found = measure(dataset, "x", load_word_lists())
    assert found.is_sample
    assert (found.num_rows, found.num_measured) in {(8, 6), (8, 5)}
    assert measure(dataset, "x", load_word_lists()) == found
    monkeypatch.setattr(representation, "MAX_SHARDS", 1)
    assert measure(dataset, "x", load_word_lists()).num_measured <= 3


def test_without_decisions_or_tables_nothing_is_measured(root, tmp_path):
    (root / "decisions.parquet").unlink()
    dataset = write_tables(tmp_path / "other", ROWS)
    assert measure(type(dataset)(root), "x", load_word_lists()) is None
    dataset.images_table(0).unlink()
    assert measure(dataset, "x", load_word_lists()) is None


def test_the_card_shows_table_and_plot_and_keeps_them_when_the_dataset_is_gone(root, tmp_path):
    run = make_run(tmp_path)
    assert "is not measured" in write_card(run).read_text()
    result = CliRunner().invoke(app, ["card", str(run)])
    assert result.exit_code == 0, result.output
    text = (run / "README.md").read_text()
    assert "### Who and what is spoken of: pretty" in text
    assert "| women | 37.50% | 28.57% | 25.00% |" in text
    assert "| doctors | 1 | 0 | 0 | 1 |" in text
    assert "![Shares of captions and hosts before and after the filters](representation-1.png)" in text
    image = Image.open(run / "representation-1.png").convert("L")
    assert image.width > 700
    assert image.getextrema()[0] < 60
    made = [run / name for name in ("representation.json", "representation-1.png")]
    written = [path.stat().st_mtime_ns for path in made]
    root.rename(tmp_path / "moved")
    measure_representation(run)
    assert "| women | 37.50% | 28.57% | 25.00% |" in write_card(run).read_text()
    assert [path.stat().st_mtime_ns for path in made] == written


def test_it_is_measured_again_only_if_tables_or_lists_changed(root, tmp_path, monkeypatch):
    monkeypatch.setattr("sdtrain.model_card.write.plot_all", lambda *_: None)
    run = make_run(tmp_path)
    measure_representation(run)
    before = (run / "representation.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("sdtrain.model_card.representation_record.measure", lambda *_: pytest.fail("measured again"))
        measure_representation(run)
    assert (run / "representation.json").read_bytes() == before
    lists = {"description": "mine", "groups": {"animals": {"dogs": ["dog", "DOGS"], "apes": ["mankind"]}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(lists))
    measure_representation(run, tmp_path / "mine.yaml")
    (found,) = read_representation(run)
    assert (found.word_lists, list(found.groups), found.crossed) == ("mine", ["animals"], {})
    assert counts(found.groups["animals"], "dogs") == (1, 1, 1, 1)
    assert {one.name for one in found.languages} == {UNDETERMINED, NO_LETTERS, "Japanese"}
    assert "| apes |" in write_card(run).read_text()


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"groups": {"animals": {"dogs": []}}}, "'animals: dogs' needs words"),
        ({"groups": {"animals": {"dogs": ["?!"]}}}, "'animals: dogs' needs words"),
        ({"groups": {}, "languages": {"English": [True]}}, "languages.English"),
        ({"groups": {}, "crossed": ["a", "b"]}, "crossed names 'a'"),
        ({"group": {}}, "group"),
    ],
)
def test_lists_with_a_mistake_are_refused(tmp_path, lists, message):
    (tmp_path / "lists.yaml").write_text(yaml.safe_dump(lists))
    with pytest.raises(UserError, match=message):
        load_word_lists(tmp_path / "lists.yaml")


def test_words_of_any_form_are_found(tmp_path):
    lists = WordLists(groups={"t": {"g": ("African-American", "o'neill", "c++ (x)", "été")}})
    captions = ["an african american", "African-American", "O'Neill shop", "c x", "ÉTÉ", "cx", "été_2"]
    dataset = write_tables(tmp_path, [(f"http://a.com/{n}.jpg", caption, *KEPT) for n, caption in enumerate(captions)])
    assert counts(measure(dataset, "x", lists).groups["t"], "g")[0] == 6


def test_our_own_lists_are_whole_words_and_no_group_is_there_twice():
    lists = load_word_lists()
    names = [(theme, group) for theme, group, _ in lists.each()]
    assert len(set(names)) == len(names) > 40
    assert all(word == word.lower() for *_, words in lists.each() for word in words)
    content = yaml.safe_load(OWN.read_text())
    assert set(content) == {"description", "groups", "crossed", "languages"}
    assert json.loads(lists.model_dump_json())["description"]


def test_a_change_that_chance_would_make_is_none():
    # of 1,000 rows with 100 of the group, half of both are dropped; then none and all of the group
    assert _deviation(1000, 500, 100, 50) == 0
    assert _deviation(1000, 500, 100, 100) == pytest.approx(10.54, abs=0.01)  # (0.2 - 0) / sqrt(0.09 * 2 / 500)
    assert _deviation(1000, 1000, 100, 100) == 0
