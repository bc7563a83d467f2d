"""From metadata to latents with generated captions and rules in words; a removal takes both out of every file."""

import hashlib

import duckdb
import pyarrow.parquet as pq
import pytest

from filters.inspect.views import write_views
from filters.recipe_record import read_recipe
from sdtrain.dataset.layout import DatasetDir
from tests.chat_server import MODEL, chat_server, completion
from tests.filters.caption.caption_fixtures import packed_json
from tests.filters.removal_fixtures import build, files_with, make_recipe, remove, uid_of, write_metadata

QUESTION = "Is it a photograph?"


def reply(asked):
    seen = hashlib.sha256(asked.images[0]).hexdigest()[:12]
    return completion("No." if QUESTION in asked.prompt else f"described {seen}")


@pytest.mark.slow
def test_a_removed_image_leaves_its_captions_and_answers(photo_site, tmp_path):
    port = photo_site[1]
    metadata = write_metadata(tmp_path / "metadata" / "a.parquet", port, [0, 1, 2, 8, 11])
    dataset = DatasetDir(tmp_path / "data")
    with chat_server(reply) as server:
        caption = {"endpoint": {"url": server.url, "model": MODEL}, "prompts": {"short": "What is it?"}}
        rules = {"min_side": 64, "ask": [{"question": QUESTION, "max": 0.5}]}
        build(dataset, make_recipe(metadata, caption=caption, decide={"rules": rules}))
        write_views(dataset, read_recipe(dataset))
        with duckdb.connect(str(dataset.root / "metadata.duckdb"), read_only=True) as views:
            answered = views.execute(f"SELECT uid, answers['{QUESTION}'] FROM answers ORDER BY uid").fetchall()
            described = dict(views.execute("SELECT uid, text FROM captions WHERE source = 'short'").fetchall())
        assert [uid for uid, _ in answered] == sorted(described)
        assert {chance for _, chance in answered} == {0.0}
        gone = uid_of(1, port)
        captions = packed_json(dataset, "latents")
        assert {one["text"] for one in captions[gone]["captions"] if one["source"] == "short"} == {described[gone]}
        assert files_with(dataset.root, [described[gone]])
        num_asked = len(server.asked)
        remove(dataset, "uid", [gone])
        assert files_with(dataset.root, [described[gone], gone]) == []
        tables = [*dataset.root.glob("answers/*.parquet"), *dataset.root.glob("captions/*.parquet")]
        assert not [path for path in tables if gone in pq.read_table(path)["uid"].to_pylist()]
        assert build(dataset, read_recipe(dataset)) == []
        assert len(server.asked) == num_asked
