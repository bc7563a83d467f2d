"""No command's cost grows faster than the number of shards. Calls are counted: seconds depend on the machine."""

import cProfile
import gc
import pstats
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from filters import pipeline
from sdtrain.cli import app
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import entries
from sdtrain.dataset.tables import columns
from sdtrain.loading import shard_catalog
from sdtrain.loading.latent_store import LatentStore
from tests.benchmarks.scale_world import real_uids, write_world

SIZES = (50, 125, 200)
"""At equal distances: where cost is linear both steps cost the same, where quadratic the second 1.9 times the first."""


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return {size: write_world(tmp_path_factory.mktemp(f"world-{size}"), size, embedded=True) for size in SIZES}


def run(*arguments: object) -> None:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output


def remove_ten(dataset: DatasetDir) -> None:
    first = 10 * len(entries(dataset, "remove"))  # not those of the call that warmed up
    listed = dataset.root.parent / "removed.txt"
    listed.write_text("\n".join(real_uids(dataset)[first : first + 10]))
    run("remove", dataset.root, "--list", listed, "--by", "uid")


def all_fingerprints(dataset: DatasetDir) -> None:
    """As the workers of a build ask for them, shard by shard."""
    from filters.recipe_record import read_recipe

    recipe = read_recipe(dataset)
    for stage in pipeline.stages_of(recipe):
        if stage.num_shards(dataset, recipe) != 1:
            for shard in stage.shards(dataset, recipe):
                stage.fingerprint(dataset, recipe, shard)


def serve_metrics_once(dataset: DatasetDir) -> None:
    from filters.inspect.prometheus import StatusCollector

    assert len(list(StatusCollector([str(dataset.root)]).collect())) > 1


def retry(dataset: DatasetDir) -> None:
    from filters.recipe_record import read_recipe
    from sdtrain.download.retry import retry_and_count

    assert retry_and_count(dataset, read_recipe(dataset)).num_shards == 0  # nothing has failed: all shards are asked


def ask_card(dataset: DatasetDir) -> None:
    from sdtrain.model_card.records import dataset_facts

    assert dataset_facts(dataset.root).stage_hours


def search(dataset: DatasetDir) -> None:
    """What a search asks of all shards; the index itself is faiss's."""
    from filters.search.embeddings import embeddings_digest
    from filters.search.search import by_key, by_words

    embeddings_digest(dataset)
    assert by_words(dataset, "photograph", 5)
    assert by_key(dataset, "no key") == []


def make_search_index(dataset: DatasetDir) -> None:
    from filters.search.index import forget_index, open_index

    forget_index(dataset)
    assert open_index(dataset).info.num_vectors == 2 * len(entries(dataset, "score"))


def find_memorised(dataset: DatasetDir) -> None:
    from filters.memorization.check import check_samples
    from filters.memorization.samples import Sample
    from filters.search.search import Search

    samples = [Sample("a gray image", lambda: Image.new("RGB", (64, 64), "gray"))]
    assert check_samples(Search(dataset), samples).verdicts


def start_training(dataset: DatasetDir) -> None:
    """As far as the samples are open, and the indexes of the first and last are made."""
    store = LatentStore(dataset.root, 64)
    assert len(store.uids(np.array([0, len(store) - 1]))) == 2


COMMANDS = {
    "build with nothing to do": lambda d: run("build", d.recipe, "--output", d.root),
    "status": lambda d: run("status", d.root),
    "funnel": lambda d: run("funnel", d.root),
    "decide": lambda d: run("decide", d.root, "--dry-run"),
    "query": lambda d: run("query", d.root, "SELECT * FROM images LIMIT 1"),
    "views": lambda d: run("views", d.root),
    "report": lambda d: run("report", d.root),
    "fingerprints": all_fingerprints,
    "metrics": serve_metrics_once,
    "retry": retry,
    "model card": ask_card,
    "search": search,
    "search index": make_search_index,
    "memorised": find_memorised,
    "start of training": start_training,
    "remove": remove_ten,
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_calls_grow_no_faster_than_shards(worlds, command):
    count_calls(command, worlds[SIZES[0]].dataset)  # imports, and what is cached for the process
    few, more, most = (count_calls(command, world.dataset) for world in worlds.values())
    noise = 0.1 * few  # of drawing diagrams
    assert most - more < 1.3 * max(more - few, 0) + noise, (few, more, most)


def count_calls(command: str, dataset: DatasetDir) -> int:
    gc.collect()  # not while calls are counted; and a store, which holds itself by its caches, gives its lock back
    with pytest.MonkeyPatch.context() as patch, cProfile.Profile() as profile:
        # How often threads wait for one another depends on the machine, and what they do is not counted.
        for module in (shard_catalog, columns):
            patch.setattr(module, "ThreadPoolExecutor", lambda num: nullcontext(SimpleNamespace(map=map)))
        COMMANDS[command](dataset)
    gc.collect()
    return pstats.Stats(profile).total_calls
