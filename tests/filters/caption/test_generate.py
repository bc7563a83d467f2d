"""Captions from a server: stored with their provenance, never asked twice, the same bytes after a kill."""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
from functools import partial

import pyarrow.parquet as pq
import pytest
from PIL import Image

from filters.caption.stage import CAPTION
from filters.caption_config import PROMPTS
from filters.recipe import Recipe
from filters.recipe_record import record_recipe
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import read_entry, write_entry
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.endpoint.budget import usage_in
from sdtrain.endpoint.messages import jpeg_of
from sdtrain.errors import UserError
from sdtrain.images.decode import decode_rgb
from sdtrain.settings import parse_settings
from tests.chat_server import MODEL, chat_server, completion, error
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads

NO_NETWORKS = {f"{name}_weights": None for name in ("clip", "aesthetic", "safety", "watermark")}
PER_SHARD = 4


def recipe_of(caption, **sections):
    content = {"name": "captioned", "select": {"metadata": "x"}, "score": NO_NETWORKS, "caption": caption} | sections
    return parse_settings(Recipe, content, "recipe.yaml")


def asking(server, prompts=None, **endpoint):
    config = {"url": server.url, "model": MODEL, "concurrency": 2} | endpoint
    return recipe_of({"endpoint": config, "image_px": 64} | ({"prompts": prompts} if prompts else {}))


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Six images in two shards, scored and grouped, and one that was not fetched."""
    rows = [Fetched(encoded(scene_image(number)), f"alt {number}") for number in range(6)]
    rows.insert(2, Fetched(None, "gone", reason="http_404"))
    dataset = write_downloads(tmp_path_factory.mktemp("scored"), rows, PER_SHARD)
    finish_before(dataset, recipe_of({}))
    return dataset


def finish_before(dataset, recipe):
    from filters.dedup import DEDUP
    from filters.score.stage import SCORE

    record_recipe(dataset, recipe)
    for stage in (SCORE, DEDUP):
        run_batch(stage, dataset, recipe, stage.shards(dataset, recipe))


@pytest.fixture
def dataset(scored, tmp_path):
    return DatasetDir(shutil.copytree(scored.root, tmp_path / "data"))


def describe(asked):
    """The same words for the same image and question."""
    seen = hashlib.sha256(asked.images[0] + asked.prompt.encode()).hexdigest()[:8]
    return completion(f"{'a long text' if 'paragraph' in asked.prompt else 'a scene'} {seen}\nwith colours")


def rows_of(dataset):
    paths = [dataset.captions_table(shard) for shard in (0, 1)]
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def bytes_of(dataset):
    return [dataset.captions_table(shard).read_bytes() for shard in (0, 1)]


def test_each_image_has_its_alt_text_and_an_answer_to_each_prompt(dataset):
    with chat_server(describe) as server:
        recipe = asking(server)
        run_batch(CAPTION, dataset, recipe, [0, 1])
        assert len(server.asked) == 6 * 2
        assert {asked.prompt for asked in server.asked} == set(PROMPTS.values())
        assert max(max(Image.open(io.BytesIO(asked.images[0])).size) for asked in server.asked) == 64
        assert pending(CAPTION, dataset, recipe) == []
    rows = rows_of(dataset)
    sources = [row["source"] for row in rows]
    assert sources == ["alt", "short", "long"] * 6
    assert all(row["origin_uid"] == row["uid"] for row in rows)
    assert all("\n" not in row["text"] and row["num_tokens"] > 2 for row in rows)
    first = decode_rgb(encoded(scene_image(0)))
    seen = hashlib.sha256(jpeg_of(first, 64) + PROMPTS["short"].encode()).hexdigest()[:8]
    assert rows[1]["text"] == f"a scene {seen} with colours"
    described = pq.read_schema(dataset.captions_table(0)).metadata
    assert json.loads(described[b"sdtrain.caption.models"]) == [MODEL]
    assert json.loads(described[b"sdtrain.caption.settings"])["prompts"] == [list(pair) for pair in PROMPTS.items()]
    assert not list((dataset.root / "captions").glob("*.jsonl"))


def test_the_prompt_and_the_model_are_in_the_fingerprint_and_the_address_is_not(dataset):
    with chat_server(describe) as server:
        recipe = asking(server)
        run_batch(CAPTION, dataset, recipe, [0, 1])
        moved = asking(server, concurrency=7, max_total_tokens=10**9, url="http://127.0.0.1:1/v1")
        assert pending(CAPTION, dataset, moved) == []
        assert pending(CAPTION, dataset, asking(server, model="other")) == [0, 1]
        assert pending(CAPTION, dataset, asking(server, prompts={"short": "What is it?"})) == [0, 1]


def test_what_cannot_be_used_is_counted_and_leaves_the_alt_text(dataset):
    replies = [
        completion("I'm sorry, but I can't help with that."),
        completion(""),
        completion("and on " * 4000, finish="length", usage=(9, 4000)),
        error(400, "image too large"),
    ]

    def reply(asked):
        with server.lock:
            return replies[len(server.asked) - 1] if len(server.asked) <= len(replies) else completion("a scene")

    with chat_server(reply) as server:
        run_batch(CAPTION, dataset, asking(server, prompts={"short": "What is it?"}, concurrency=1), [0, 1])
    assert [row["source"] for row in rows_of(dataset)] == ["alt"] * 4 + ["alt", "short"] * 2
    notes = [note for shard in (0, 1) for note in read_entry(dataset, "caption", shard).notes]
    assert notes == [
        "caption 'short': 1 of 3 answers empty (no words)",
        "caption 'short': 1 of 3 answers refused (the model declines, or a content filter stopped it)",
        "caption 'short': 1 of 3 answers too_long (cut off at max_tokens, or longer)",
        "caption 'short': 1 of 3 answers rejected (the server does not accept the request (400, 413, 422))",
    ]
    counted = json.loads(pq.read_schema(dataset.captions_table(1)).metadata[b"sdtrain.caption.answers"])
    assert counted == {"short": {"rejected": 1, "text": 2}}


def test_the_budget_stops_the_stage_and_it_goes_on_without_asking_again(dataset):
    with chat_server(describe) as server:
        limited = asking(server, max_total_tokens=110 * 5)
        with pytest.raises(UserError, match=r"caption\.endpoint\.max_total_tokens is 550"):
            run_batch(CAPTION, dataset, limited, [0, 1])
        assert len(server.asked) in (5, 6)
        raised = asking(server, max_total_tokens=10**6)
        run_batch(CAPTION, dataset, raised, pending(CAPTION, dataset, raised))
        assert len(server.asked) == 12
    assert len(rows_of(dataset)) == 18
    assert usage_in(dataset.spent).total_tokens == 110 * 12


def test_a_kill_loses_no_answer_and_gives_the_same_bytes(scored, dataset, tmp_path):
    whole = DatasetDir(shutil.copytree(scored.root, tmp_path / "whole"))
    with chat_server(describe) as server:
        run_batch(CAPTION, whole, asking(server), [0, 1])
    killed_at = 5

    def reply(asked):
        with server.lock:
            number = len(server.asked)
        if number == killed_at:
            os.kill(child.pid, signal.SIGKILL)
        return describe(asked)

    with chat_server(reply) as server:
        recipe = asking(server, concurrency=1)
        child = multiprocessing.get_context("fork").Process(target=partial(run_batch, CAPTION, dataset, recipe, [0, 1]))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        log = dataset.caption_answers(0)
        assert log.read_bytes().count(b"\n") == 1 + killed_at - 1
        log.write_bytes(log.read_bytes() + b'{"uid": "half a li')
        run_batch(CAPTION, dataset, recipe, pending(CAPTION, dataset, recipe))
        assert len(server.asked) == 12 + 1  # the one in flight
        # Killed after the first shard was recorded, and before its answers were deleted.
        dataset.caption_answers(0).write_bytes(b"left over")
        dataset.manifest_entry("caption", 1).unlink()
        run_batch(CAPTION, dataset, recipe, [1])
        assert not dataset.caption_answers(0).exists()
    assert bytes_of(dataset) == bytes_of(whole)


def test_answers_to_another_prompt_are_not_taken(dataset):
    with chat_server(describe) as server:
        with pytest.raises(UserError, match="budget is spent"):
            run_batch(CAPTION, dataset, asking(server, {"short": "A?"}, max_total_tokens=100), [0])
        run_batch(CAPTION, dataset, asking(server, {"short": "B?"}), [0])
        assert [asked.prompt for asked in server.asked].count("B?") == 3


def test_what_was_answered_is_not_asked_again_when_the_dataset_has_changed_around_it(dataset):
    replies = iter([completion("I'm sorry, but I can't help with that.")])
    with chat_server(lambda asked: next(replies, None) or describe(asked)) as server:
        recipe = asking(server, {"short": "What is it?"}, concurrency=1)
        run_batch(CAPTION, dataset, recipe, [0, 1])
        first, before = len(server.asked), rows_of(dataset)
        entry = read_entry(dataset, "dedup", 0)  # as after the dataset has grown
        write_entry(dataset, entry.model_copy(update={"fingerprint": "f" * 64}))
        assert pending(CAPTION, dataset, recipe) == [0, 1]
        run_batch(CAPTION, dataset, recipe, [0, 1])
        assert len(server.asked) == first + 1, "the one that was refused"
        after = rows_of(dataset)
        assert [row for row in before if row not in after] == []
        assert len(after) == len(before) + 1
        described = pq.read_schema(dataset.captions_table(1)).metadata
        assert json.loads(described[b"sdtrain.caption.models"]) == [MODEL]
        assert json.loads(described[b"sdtrain.caption.answers"]) == {"short": {"text": 3}}
        # Another prompt beside it is asked alone.
        run_batch(CAPTION, dataset, asking(server, {"short": "What is it?", "why": "Why?"}), [0, 1])
        assert [asked.prompt for asked in server.asked[first + 1 :]] == ["Why?"] * 6
        # An image whose pixels are others is asked about again.
        scores = pq.read_table(dataset.scores(1))
        digests = ["0" * 64, *scores["pixel_sha256"].to_pylist()[1:]]
        place = scores.column_names.index("pixel_sha256")
        pq.write_table(scores.set_column(place, "pixel_sha256", [digests]), dataset.scores(1))
        run_batch(CAPTION, dataset, recipe, [1])
        assert len(server.asked) == first + 1 + 6 + 1


def test_before_anything_is_sent_it_is_said_how_much_and_where(dataset, caplog):
    with chat_server(describe) as server:
        recipe = asking(server)
        (checked,) = CAPTION.needs.files(recipe).values()
        assert checked() == f"{MODEL} at {server.url}"
        (said,) = CAPTION.needs.sized(recipe, 1_000_000).values()
        assert said() == f"up to 2,000,000 requests to {server.url}, 2 about each image, which is sent there"
        assert not server.asked
        run_batch(CAPTION, dataset, recipe, [1])
        assert f"caption: up to 6 requests to {server.url}, 2 about each image, which is sent there" in caplog.text


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ({"prompts": {"short": "What?"}}, "asked nobody"),
        ({"endpoint": {"url": "http://h/v1", "model": "m"}, "model": {"name": "x"}}, "give one"),
        ({"endpoint": {"url": "http://h/v1", "model": "m"}, "prompts": {"alt": "What?"}}, "name of a prompt"),
    ],
)
def test_contradictory_settings_are_refused(caption, message):
    with pytest.raises(UserError, match=message):
        recipe_of(caption)
