"""Score files joined onto metadata, compared with plain Python."""

import mmh3
import pytest

from filters.recipe import load_recipe
from filters.select.sql_functions import laion_hash
from filters.select_config import SelectConfig
from sdtrain.errors import UserError
from tests.filters.select.side_input_fixtures import HASHES, MD5S, NUM_ROWS, TEXTS, URLS, apply, write, write_metadata


@pytest.fixture
def metadata(tmp_path):
    return write_metadata(tmp_path / "metadata")


@pytest.mark.parametrize("by", ["hash", "url_caption"])
@pytest.mark.parametrize("has_hash", [True, False])
def test_scores_fill_what_the_metadata_does_not_have_and_nothing_else(tmp_path, metadata, by, has_hash):
    shown = range(0, NUM_ROWS, 3)
    columns = {"URL": [URLS[i] for i in shown], "TEXT": [TEXTS[i] for i in shown]}
    if has_hash:
        columns = ({} if by == "hash" else columns) | {"hash": [HASHES[i] for i in shown]}
    scores = {"pwatermark": [i / 64 for i in shown], "AESTHETIC_SCORE": [i / 8 for i in shown]}
    scores |= {"md5": [MD5S[i] for i in shown]}
    files = write(tmp_path / "scores" / "a.parquet", **columns, **scores)
    rows = apply(SelectConfig(metadata=metadata, joins=[{"files": files, "by": by}]))
    for i, row in enumerate(rows):
        own = 0.75 if i >= 20 and (i - 20) % 2 == 0 else None
        assert row["pwatermark"] == (own if own is not None else i / 64 if i in shown else None)
        assert row["aesthetic"] == (i / 8 if i in shown else None)
        assert row["md5"] == (MD5S[i] if i in shown else None)
        assert row["hash"] == (HASHES[i] if by == "hash" or not 10 <= i < 20 else None)


def test_of_several_joins_the_first_that_knows_a_score_wins_and_columns_can_be_chosen(tmp_path, metadata):
    first = write(tmp_path / "first.parquet", hash=HASHES[:5], punsafe=[0.1, None, 0.1, 0.1, 0.1], aesthetic=[9.0] * 5)
    second = write(tmp_path / "second.parquet", URL=URLS[:6], TEXT=TEXTS[:6], punsafe=[0.2] * 6, similarity=[0.3] * 6)
    joins = [{"files": first}, {"files": second, "by": "url_caption", "columns": ["punsafe"]}]
    rows = apply(SelectConfig(metadata=metadata, joins=joins))
    assert [row["punsafe"] for row in rows[:7]] == [0.1, 0.2, 0.1, 0.1, 0.1, 0.2, None]
    assert [row["aesthetic_v1"] for row in rows[4:6]] == [9.0, None]  # `aesthetic` is the first predictor's
    assert {row["aesthetic"] for row in rows} == {row["similarity"] for row in rows} == {None}


def test_of_repeated_keys_one_whole_row_wins_the_same_in_any_order_and_how_many_is_said(tmp_path, metadata):
    rows = [(HASHES[0], 0.5, 0.1), (HASHES[0], 0.25, 0.9), (HASHES[0], 0.25, None), (HASHES[1], 0.5, 0.5)]
    rows.append((None, 0.1, 0.1))
    found = []
    for name, ordered in (("a", rows), ("b", rows[::-1])):
        keys, unsafe, watermarks = zip(*ordered, strict=True)
        files = write(tmp_path / f"{name}.parquet", hash=list(keys), punsafe=list(unsafe), pwatermark=list(watermarks))
        select = SelectConfig(metadata=metadata, joins=[{"files": files}])
        found.append([(row["pwatermark"], row["punsafe"]) for row in apply(select)[:3]])
    assert found[0] == found[1] == [(0.1, 0.5), (0.5, 0.5), (None, None)]
    said = apply(select, "remarks")
    assert any("2 of them have the key of another row" in note for note in said)
    assert "hash of URL and TEXT computed for 1 of 3 files, which have none" in said
    assert "hash of URL and TEXT agrees in 20 rows looked at" in said


def test_a_hash_of_something_else_is_refused_with_an_example(tmp_path, metadata):
    scores = write(tmp_path / "scores.parquet", hash=HASHES[:2], punsafe=[0.1, 0.2])
    other = write(tmp_path / "other" / "x.parquet", URL=URLS[:2], TEXT=TEXTS[:2], hash=[HASHES[0], 5])
    with pytest.raises(UserError, match=rf"x.parquet is not the hash of URL and TEXT: for {URLS[1]} it holds 5, not"):
        apply(SelectConfig(metadata=other, joins=[{"files": scores}]))
    text = write(tmp_path / "text" / "x.parquet", URL=URLS[:2], TEXT=TEXTS[:2], hash=["ab", "cd"])
    with pytest.raises(UserError, match=r"'hash' of .*x.parquet is not the hash"):
        apply(SelectConfig(metadata=text, blocklists=[{"files": scores, "by": "hash"}]))
    with pytest.raises(UserError, match=r"'hash' of .*x.parquet is not the hash"):
        apply(SelectConfig(metadata=metadata, blocklists=[{"files": other, "by": "hash"}]))


def test_the_hash_is_that_of_laion():
    assert laion_hash("https://e.com/ä", None) == mmh3.hash64("https://e.com/ä")[0]
    assert laion_hash(None, "x") == mmh3.hash64(b"x", signed=True)[0]


@pytest.mark.parametrize(
    ("join", "words"),
    [
        ({"files": "nowhere.parquet"}, r"no file or folder .*nowhere.parquet, which the recipe names as score files"),
        ({"files": "urls.parquet", "by": "url_caption"}, "cannot be joined by url_caption: it has no column caption"),
        ({"files": "urls.parquet"}, "cannot be joined by hash"),
        ({"files": "keys.parquet"}, "hold no scores"),
        ({"files": "scores.parquet", "columns": ["aesthetic"]}, "have no column for 'aesthetic'"),
    ],
)
def test_score_files_that_do_not_fit_are_sentences(tmp_path, metadata, join, words):
    write(tmp_path / "urls.parquet", URL=URLS, punsafe=[0.1] * NUM_ROWS)
    write(tmp_path / "keys.parquet", hash=HASHES)
    write(tmp_path / "scores.parquet", hash=HASHES, punsafe=[0.1] * NUM_ROWS)
    with pytest.raises(UserError, match=words):
        apply(SelectConfig(metadata=metadata, joins=[join | {"files": str(tmp_path / join["files"])}]))


def test_wrong_settings_are_sentences(tmp_path):
    recipe = tmp_path / "mine.yaml"
    for setting, words in [
        ("joins: [{files: x, colums: [a]}]", "unknown key 'select.joins.0.colums'. Did you mean 'columns'"),
        ("joins: [{files: x, columns: [aestetic]}]", "column 'aestetic' cannot be joined. Did you mean 'aesthetic'"),
        ("blocklists: [{files: x, by: domain}]", "'select.blocklists.0.by' is 'domain'"),
        ("blocklists: [{files: x}]", "'select.blocklists.0.by' is missing"),
    ]:
        recipe.write_text(f"name: mine\nselect: {{{setting}}}\n")
        with pytest.raises(UserError, match=words):
            load_recipe(str(recipe))
