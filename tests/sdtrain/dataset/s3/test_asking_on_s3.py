"""Captions and rules in words of a dataset on S3: continued on an empty machine, and nothing is asked twice."""

import shutil

import pyarrow.parquet as pq
import pytest

from filters.ask.stage import ASK
from filters.caption.stage import CAPTION
from sdtrain.dataset.lock import lock_to_change
from sdtrain.dataset.manifest import entries, write_entry
from sdtrain.dataset.open import dataset_at
from sdtrain.dataset.stage import begin, pending, run_batch
from sdtrain.dataset.sync import fetch_outputs, keep_local, push_files
from sdtrain.settings import dump_settings
from tests.chat_server import MODEL, chat_server, completion
from tests.filters.caption.test_generate import describe, finish_before, recipe_of
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads
from tests.sdtrain.dataset.s3.s3_fixtures import BUCKET
from tests.sdtrain.dataset.s3.test_requests import counted

QUESTIONS = ["Is it red?", "Is it blue?"]


class StopError(Exception):
    """A build ended after a shard was recorded."""


def scored(folder, num_shards):
    """One image a shard."""
    rows = [Fetched(encoded(scene_image(number)), f"alt {number}") for number in range(num_shards)]
    dataset = write_downloads(folder, rows, 1)
    finish_before(dataset, recipe_of({}))
    return dataset


def uploaded(local, url, folder):
    written = dataset_at(url, folder)
    with lock_to_change(written, "sdtrain build"):
        shutil.copytree(local.root, written.root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest"))
        written.recipe.write_text(dump_settings(recipe_of({})))
        push_files(written, written.recipe)
        for stage in ("select", "download", "score", "dedup"):
            for entry in entries(local, stage):
                write_entry(written, entry)


def recipe_with(server, questions):
    endpoint = {"url": server.url, "model": MODEL, "concurrency": 1}
    caption = {"endpoint": endpoint, "image_px": 64, "prompts": {"short": "Describe it."}}
    return recipe_of(caption, decide={"rules": {"ask": questions}})


def answer(asked):
    return completion("No") if asked.prompt.startswith("Is it") else describe(asked)


def on_machine(url, folder, recipe, stage, stop_after=None):
    """Runs a stage on a machine that has nothing of the dataset, and keeps no tars."""
    dataset = dataset_at(url, folder)
    reports = []

    def told(report):
        reports.append(report.shard)
        if len(reports) == stop_after:
            raise StopError

    with lock_to_change(dataset, "sdtrain build"):
        begin(stage, dataset)
        keep_local(dataset, False)
        run_batch(stage, dataset, recipe, pending(stage, dataset, recipe), told)
    return dataset


def test_a_stopped_build_is_continued_elsewhere_and_only_what_is_new_is_asked(store, tmp_path):
    local, url = scored(tmp_path / "local", 4), f"s3://{BUCKET}/asking"
    uploaded(local, url, tmp_path / "writer")
    with chat_server(answer) as server:
        recipe = recipe_with(server, QUESTIONS[:1])
        with pytest.raises(StopError):
            on_machine(url, tmp_path / "first", recipe, CAPTION, stop_after=1)
        num_asked = len(server.asked)
        assert 1 <= num_asked < 4
        dataset = on_machine(url, tmp_path / "second", recipe, CAPTION)
        assert len(server.asked) <= 4 + 1  # what was under way when it stopped
        run_batch(CAPTION, local, recipe, range(4))
        fetch_outputs(dataset, "caption")
        for shard in range(4):
            assert dataset.captions_table(shard).read_bytes() == local.captions_table(shard).read_bytes()

        for number, folder in enumerate(("third", "fourth")):
            server.asked.clear()
            dataset = on_machine(url, tmp_path / folder, recipe_with(server, QUESTIONS[: number + 1]), ASK)
            assert [asked.prompt.partition("?")[0] + "?" for asked in server.asked] == [QUESTIONS[number]] * 4
        assert dict(pq.read_table(dataset.answers_table(3))["answers"][0].as_py()).keys() == set(QUESTIONS)
    assert not [path for folder in ("second", "fourth") for path in (tmp_path / folder).rglob("*.tar")]


@pytest.mark.slow
def test_the_store_is_asked_in_proportion_to_the_shards(store, tmp_path):
    requests = {}
    with chat_server(answer) as server:
        recipe = recipe_with(server, QUESTIONS)
        for num in (2, 4, 6):
            url = f"s3://{BUCKET}/asking-{num}"
            uploaded(scored(tmp_path / str(num), num), url, tmp_path / f"writer-{num}")
            for stage in (CAPTION, ASK):
                with counted() as seen:
                    on_machine(url, tmp_path / f"{stage.name}-{num}", recipe, stage)
                requests[stage.name, num] = seen
    for stage in (CAPTION, ASK):
        few, more, most = (reads(requests[stage.name, num]) for num in (2, 4, 6))
        assert most - more <= more - few + 1, requests
        assert more - few <= 2 * 7, requests
        # The lock is renewed at intervals.
        assert requests[stage.name, 6]["PutObject"] <= 4 * 6 + 10, requests


def reads(seen):
    return sum(seen[kind] for kind in ("GetObject", "HeadObject", "ListObjectsV2"))
