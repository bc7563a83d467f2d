"""The report tells of each source of captions, in known numbers, and shows images beside all their captions."""

from __future__ import annotations

import re

import duckdb
import pytest

from filters.caption.stage import CAPTION
from filters.caption.table import Caption, write_captions
from filters.decide.stage import DECIDE
from filters.dedup import DEDUP
from filters.inspect.report import report_on
from filters.inspect.views import write_views
from filters.recipe import Recipe
from filters.score.stage import SCORE
from sdtrain.dataset.stage import run_batch
from sdtrain.model_card.representation import measure
from sdtrain.model_card.word_lists import load_word_lists
from sdtrain.report.captions import draw_captions
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads

NO_MODELS = dict.fromkeys(("clip_weights", "aesthetic_weights", "watermark_weights", "safety_weights"))
LONG = "the old house by the sea " * 20


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    settings = {"duplicates": {"level": "exact"}, "decide": {"rules": {"min_side": 500}}}
    return Recipe(name="small", score=NO_MODELS, caption={"from_duplicates": True}, **settings)


@pytest.fixture(scope="module")
def dataset(recipe, tmp_path_factory):
    """Four kept images with alt texts, three of which a prompt describes, and a small one that was dropped."""
    rows = [Fetched(encoded(scene_image(i)), f"image number {i} of the set", (600, 600)) for i in range(4)]
    rows.append(Fetched(encoded(scene_image(9)), "a small one", (600, 300)))
    dataset = write_downloads(tmp_path_factory.mktemp("data"), rows)
    for stage in (SCORE, DEDUP, CAPTION, DECIDE):
        run_batch(stage, dataset, recipe, stage.shards(dataset, recipe))
    uids = [uid for (uid,) in duckdb.execute(f"SELECT uid FROM '{dataset.images_table(0)}' ORDER BY key").fetchall()]
    generated = [
        Caption(uids[0], "short", "ein rotes Haus und der Hund", uids[0], 0.25),
        Caption(uids[1], "short", LONG, uids[1], 0.35),
        Caption(uids[2], "short", "the <b>tree</b> and the house", uids[2], 0.3),
        Caption(uids[4], "short", "dropped", uids[4], 0.9),
    ]
    alt = [Caption(uid, "alt", f"image number {number} of the set", uid) for number, uid in enumerate(uids)]
    write_captions(dataset.captions_table(0), [*alt, *generated])
    write_views(dataset, recipe)
    return dataset


@pytest.fixture
def section(dataset, tmp_path):
    with duckdb.connect(str(dataset.database), read_only=True) as connection:
        return draw_captions(connection, dataset, tmp_path)


def test_each_source_is_counted_among_the_kept(section):
    alt, short = section.facts
    assert (alt.source, alt.num_captions, alt.num_images, alt.truncated, alt.similarity) == ("alt", 4, 4, 0, None)
    assert (short.source, short.num_captions, short.num_images) == ("short", 3, 3)
    assert short.truncated == pytest.approx(1 / 3)
    assert short.similarity == pytest.approx(0.3)
    assert dict(short.languages) == {"English": 2, "German": 1}


def test_images_stand_beside_all_that_they_are_called_and_those_of_several_sources_come_first(section, tmp_path):
    assert section.diagrams == [f"{tmp_path.name}/caption_{name}.png" for name in ("tokens", "similarity")]
    assert [len(example.captions) for example in section.examples].count(2) == 3
    assert all(example.captions[0][0] == "alt" for example in section.examples)
    assert all((tmp_path.parent / example.thumbnail).exists() for example in section.examples)


def test_the_page_has_them_and_takes_no_markup_from_a_caption(dataset, recipe):
    page = report_on(dataset, recipe).read_text()
    assert '<h2 id="captions">Captions</h2>' in page
    assert "<b>tree</b>" not in page
    assert "the &lt;b&gt;tree&lt;/b&gt;" in page
    assert all((dataset.root / name).exists() for name in re.findall(r'src="([^"]+)"', page))


def test_the_card_measures_the_same(dataset, section):
    found = measure(dataset, "small", load_word_lists())
    assert found.captions == section.facts


def test_a_dataset_without_captions_has_no_section(recipe, tmp_path):
    with duckdb.connect() as connection:
        assert draw_captions(connection, None, tmp_path) is None
        connection.execute("CREATE TABLE decisions (uid VARCHAR, reason VARCHAR)")
        connection.execute(
            "CREATE VIEW captions AS SELECT '' AS uid, '' AS source, '' AS text, 1 AS num_tokens, "
            "0.1 AS similarity WHERE false"
        )
        assert draw_captions(connection, None, tmp_path) is None
