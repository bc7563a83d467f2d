"""Rules in words: asked once, decided by thresholds that may change, and gone with a removed image."""

import hashlib
import math
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from filters.ask.stage import ASK
from filters.ask_rules import parse_questions
from filters.decide.stage import DECIDE
from filters.decide.what_if import decide_again, with_decide_rules
from filters.recipe import Recipe
from filters.recipe_record import record_recipe
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import read_entry, write_entry
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.errors import UserError
from sdtrain.images.decode import decode_rgb
from sdtrain.settings import parse_settings
from tests.chat_server import MODEL, chat_server, completion
from tests.filters.caption.test_generate import PER_SHARD, finish_before, recipe_of
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads

TEXT, RED = "Does the image contain visible text or a watermark?", "Is it red?"
NUM_IMAGES = 6


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    rows = [Fetched(encoded(scene_image(number)), f"alt {number}") for number in range(NUM_IMAGES)]
    dataset = write_downloads(tmp_path_factory.mktemp("scored"), rows, PER_SHARD)
    finish_before(dataset, recipe_of({}))
    return dataset


@pytest.fixture
def dataset(scored, tmp_path):
    return DatasetDir(shutil.copytree(scored.root, tmp_path / "data"))


def asking(server, rule, **sections):
    endpoint = {"url": server.url, "model": MODEL, "concurrency": 2}
    rules = {"decide_by": "image", "rules": {"ask": rule}}
    return recipe_of({}, **{"ask": {"endpoint": endpoint}, "decide": rules} | sections)


def chance(asked):
    """Between 0 and 1, the same for the same image and question."""
    return hashlib.sha256(asked.images[0] + asked.prompt.encode()).digest()[0] / 256 * 0.98 + 0.01


def answer(asked):
    yes = chance(asked)
    return completion("Yes" if yes > 0.5 else "No", logprobs={"Yes": math.log(yes), "No": math.log(1 - yes)})


def answers_of(dataset):
    paths = [dataset.answers_table(shard) for shard in (0, 1)]
    return {row["uid"]: dict(row["answers"]) for path in paths for row in pq.read_table(path).to_pylist()}


def reasons_of(dataset):
    return {row["uid"]: row["reason"] for row in pq.read_table(dataset.decisions).to_pylist()}


def build(dataset, recipe):
    record_recipe(dataset, recipe)
    for stage in (ASK, DECIDE):
        run_batch(stage, dataset, recipe, pending(stage, dataset, recipe))


def test_the_probability_of_yes_is_stored_and_the_threshold_decides(dataset):
    with chat_server(answer) as server:
        recipe = asking(server, TEXT)
        build(dataset, recipe)
        assert [asked.prompt for asked in server.asked] == [f"{TEXT} Answer with one word, yes or no."] * NUM_IMAGES
        expected = sorted(chance(asked) for asked in server.asked)
        stored = answers_of(dataset)
        assert sorted(answers[TEXT] for answers in stored.values()) == pytest.approx(expected)
        reasons = reasons_of(dataset)
        assert reasons == {uid: "ask" if answers[TEXT] > 0.5 else None for uid, answers in stored.items()}
        assert {None, "ask"} == set(reasons.values())
        # Another threshold, and the opposite one, ask nobody.
        for rule, keeps in (
            ([{"question": TEXT, "max": 0.9}], lambda yes: yes <= 0.9),
            ([{"question": TEXT, "min": 0.3}, {"question": TEXT, "max": 0.8}], lambda yes: 0.3 <= yes <= 0.8),
        ):
            decide_again(dataset, with_decide_rules(recipe, {"ask": rule}))
            kept = {uid for uid, reason in reasons_of(dataset).items() if reason is None}
            assert kept == {uid for uid, answers in stored.items() if keeps(answers[TEXT])}
            assert pending(ASK, dataset, with_decide_rules(recipe, {"ask": rule})) == []
        assert len(server.asked) == NUM_IMAGES


def test_a_new_question_is_asked_alone_and_not_decided_before(dataset):
    with chat_server(answer) as server:
        recipe = asking(server, TEXT)
        build(dataset, recipe)
        before = answers_of(dataset)
        more = with_decide_rules(recipe, {"ask": [TEXT, {"question": RED, "max": 1}]})
        with pytest.raises(UserError, match=r"nobody was asked 'Is it red\?' yet"):
            decide_again(dataset, more)
        build(dataset, more)
        assert sum(RED in asked.prompt for asked in server.asked) == NUM_IMAGES
        assert len(server.asked) == 2 * NUM_IMAGES
    after = answers_of(dataset)
    assert {uid: answers[TEXT] for uid, answers in after.items()} == {uid: row[TEXT] for uid, row in before.items()}
    assert all(0 < answers[RED] < 1 for answers in after.values())


def test_a_download_that_found_more_images_asks_about_those_alone(dataset):
    with chat_server(answer) as server:
        recipe = asking(server, TEXT)
        build(dataset, recipe)
        before = answers_of(dataset)
        entry = read_entry(dataset, "download", 0)
        outputs = {name: output.model_copy(update={"sha256": "0" * 64}) for name, output in entry.outputs.items()}
        write_entry(dataset, entry.model_copy(update={"outputs": outputs}))
        table = pq.read_table(dataset.answers_table(0))
        pq.write_table(table.slice(1), dataset.answers_table(0))  # as if the first had not been there
        assert pending(ASK, dataset, recipe) == [0]
        run_batch(ASK, dataset, recipe, [0])
        assert len(server.asked) == NUM_IMAGES + 1
    assert answers_of(dataset) == before


def test_without_logprobs_the_word_counts_and_an_answer_that_is_neither_drops_the_image(dataset):
    words = ["Yes.", "no", "I'm sorry, but I can't help with that.", "Perhaps", "No text.", "yes, a watermark"]

    def reply(asked):
        with server.lock:
            return completion(words[len(server.asked) - 1])

    with chat_server(reply) as server:
        recipe = asking(server, TEXT, ask={"endpoint": {"url": server.url, "model": MODEL, "concurrency": 1}})
        build(dataset, recipe)
    assert [answers[TEXT] for answers in answers_of(dataset).values()] == [1, 0, None, None, 0, 1]
    assert list(reasons_of(dataset).values()) == ["ask", None, "ask", "ask", None, "ask"]
    assert read_entry(dataset, "ask", 0).notes == ["2 of 4 answers are neither yes nor no"]


def test_the_server_of_the_captions_answers_too():
    caption = {"endpoint": {"url": "http://h/v1", "model": "m"}}
    recipe = recipe_of(caption, decide={"rules": {"ask": TEXT}})
    assert recipe.asked.endpoint == recipe.caption.endpoint
    assert list(ASK.needs.files(recipe)) == ["caption.endpoint"]
    assert ASK.is_on(recipe)
    assert not ASK.is_on(recipe_of(caption, decide={"rules": {"ask": False}}))
    with pytest.raises(UserError, match=r"name it in ask\.endpoint"):
        recipe_of({}, decide={"rules": {"ask": TEXT}})


def test_the_rule_is_written_in_several_ways_and_recorded_in_one():
    assert parse_questions(TEXT) == [f"<= 0.5 {TEXT}"]
    assert parse_questions([{"question": TEXT, "min": 1}, RED]) == [f">= 1.0 {TEXT}", f"<= 0.5 {RED}"]
    for lines in (parse_questions(TEXT), parse_questions([{"question": TEXT, "max": 0.25}])):
        assert parse_questions(lines) == lines
    for wrong in (3, "", [], {"question": TEXT, "max": 2}, [{"question": TEXT, "above": 0.5}], [{"max": 0.5}]):
        with pytest.raises(UserError, match="rule 'ask' wants a question"):
            parse_questions(wrong)


def test_an_image_is_seen_as_it_was_downloaded(dataset):
    with chat_server(answer) as server:
        run_batch(ASK, dataset, asking(server, TEXT), [0, 1])
        sizes = {decode_rgb(asked.images[0]).size for asked in server.asked}
    assert sizes == {scene_image(0).size}


def test_the_recipes_of_the_page_are_read():
    page = (Path(__file__).parents[3] / "docs" / "captions.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    server = {"ask": {"endpoint": {"url": "http://h/v1", "model": "m"}}}
    of_recipes = [block for block in blocks if block.keys() <= Recipe.model_fields.keys()]
    recipes = [parse_settings(Recipe, {"name": "page"} | server | block, "docs/captions.md") for block in of_recipes]
    assert [(one.caption.is_on, ASK.is_on(one)) for one in recipes] == [(True, False)] * 3 + [(False, True)] * 2
