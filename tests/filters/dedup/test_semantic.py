import os
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from filters.dedup import DEDUP, clusters
from filters.dedup.clusters import num_clusters_for
from filters.dedup.stage import scored_images
from filters.recipe import DuplicatesConfig, Recipe, ScoreConfig
from filters.score.stage import SCORE
from sdtrain.dataset.progress import progress_listener
from sdtrain.dataset.stage import run_batch
from sdtrain.errors import UserError
from tests.filters.dedup.duplicate_fixtures import distinct_colors, groups_of, looks_table, search, with_embeddings
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads

NUM, DIM, NUM_COPIES = 900, 64, 100


def planted(noise: float = 0.1) -> pa.Table:
    """Images of nine subjects, all different but for the last hundred, which nearly repeat the first."""
    rng = np.random.default_rng(1)
    vectors = 0.4 * rng.normal(size=(9, DIM))[np.arange(NUM) % 9] + rng.normal(size=(NUM, DIM))
    vectors[-NUM_COPIES:] = vectors[:NUM_COPIES] + noise * rng.normal(size=(NUM_COPIES, DIM))
    hashes = rng.integers(0, 2**64, NUM, dtype=np.uint64)
    return with_embeddings(looks_table(hashes, distinct_colors(NUM)), vectors)


def semantic(table: pa.Table, **settings) -> dict[int, tuple[int, str]]:
    return groups_of(table, level="semantic", **settings)


def test_every_step_of_the_search_says_how_far_it_is():
    heard = dict[str, tuple[int, int]]()
    with progress_listener(lambda step: heard.update({step.name: (step.done, step.total)})):
        search(planted(), level="semantic")
    steps = ("reading", "equal pixels", "equal bytes", "near hashes", "clusters", "embeddings")
    assert list(heard) == [f"dedup: {step}" for step in steps]
    assert all(done == total > 0 for done, total in heard.values())


EXPECTED = {i: (i % (NUM - NUM_COPIES), "semantic") for i in (*range(NUM_COPIES), *range(NUM - NUM_COPIES, NUM))}


def test_near_embeddings_are_copies_and_others_are_not():
    assert semantic(planted()) == EXPECTED
    assert semantic(planted(), semantic_threshold=0.999) == {}


def test_the_threshold_counts_to_the_last_digit_of_what_is_stored():
    vectors = np.array([[1, 0], [0.6, 0.8]], np.float16)
    one, other = vectors.astype(float)
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    table = with_embeddings(looks_table(np.array([0, 2**40 - 1], np.uint64), distinct_colors(2)), vectors)
    assert len(semantic(table, semantic_threshold=cosine)) == 2
    assert semantic(table, semantic_threshold=np.nextafter(cosine, 1)) == {}


def test_clusters_lose_few_pairs_and_find_no_other():
    pytest.importorskip("faiss")
    found = semantic(planted(), num_clusters=6)
    assert found.items() <= EXPECTED.items()
    assert len(found) >= 0.9 * len(EXPECTED)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_clusters_depend_on_neither_threads_nor_order_nor_the_division_into_files(num_threads, monkeypatch):
    pytest.importorskip("faiss")
    table = planted(noise=0.25)
    expected = search(table, level="semantic", num_clusters=6)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(num_threads))
    monkeypatch.setattr(clusters, "_ROWS_PER_BUCKET", 100)
    mixed = table.take(pa.array(np.random.default_rng(num_threads).permutation(NUM)))
    parts = [mixed.slice(0, 1), mixed.slice(1, 0), mixed.slice(1, 500), mixed.slice(501)]
    assert search(*parts, level="semantic", num_clusters=6) == expected


def test_an_image_without_embedding_is_like_none():
    table = planted()
    known = pa.array(np.arange(NUM) != 5)
    missing = pa.compute.if_else(known, table["embedding"], pa.scalar(None, table["embedding"].type))
    table = table.set_column(table.column_names.index("embedding"), "embedding", missing)
    left = {i: group for i, group in EXPECTED.items() if i not in (5, NUM - NUM_COPIES + 5)}
    assert semantic(table) == left
    assert set(semantic(table, num_clusters=2)) <= set(left)


def test_few_images_are_compared_all_with_all_and_many_in_as_many_clusters_as_their_root():
    assert [num_clusters_for(num, None) for num in (0, 1, 16_384, 1_000_000, 100_000_000)] == [1, 1, 1, 1000, 10_000]
    assert num_clusters_for(50, 200) == 50


def test_without_faiss_a_sentence_says_what_to_install_before_anything_is_searched(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert semantic(planted()) == EXPECTED  # one cluster needs none
    with pytest.raises(UserError, match=r"pip install 'sdtrain\[semantic\]'"):
        semantic(planted(), num_clusters=2)


def test_without_embeddings_a_sentence_says_what_to_set():
    with pytest.raises(UserError, match=r"score\.store_embeddings: true"):
        semantic(planted().drop_columns(["embedding"]))
    with pytest.raises(ValueError, match=r"score\.store_embeddings: true"):
        Recipe(name="test", duplicates=DuplicatesConfig(level="semantic"))


@pytest.fixture
def scored(tmp_path):
    """Two shards of four images with embeddings: 1 and 6 show the same."""
    dataset = write_downloads(tmp_path, [Fetched(encoded(scene_image(i))) for i in range(8)], per_shard=4)
    no_models = ScoreConfig(clip_weights=None, aesthetic_weights=None, watermark_weights=None, safety_weights=None)
    run_batch(SCORE, dataset, Recipe(name="test", score=no_models), [0, 1])
    vectors = np.eye(8, dtype=np.float16)
    vectors[6] = vectors[1]
    for shard in range(2):
        table = pq.read_table(dataset.scores(shard))
        names = [name for name in table.column_names if name != "embedding"]
        table = with_embeddings(table.select(names), vectors[4 * shard : 4 * shard + 4])
        pq.write_table(table, dataset.scores(shard))
    return dataset


def semantic_recipe() -> Recipe:
    score = ScoreConfig(clip_weights="random:0", store_embeddings=True)
    return Recipe(name="test", score=score, duplicates=DuplicatesConfig(level="semantic"))


def test_the_stage_finds_them_across_shards_and_says_what_each_level_would_drop(scored):
    (report,) = run_batch(DEDUP, scored, semantic_recipe(), [0])
    assert report.dropped == {"semantic": 1}
    counts = "exact 0, perceptual 0, semantic 1"
    assert report.notes == [f"of 8 images, each level of duplicates would drop: {counts}"]


def test_embeddings_of_different_networks_are_refused(scored):
    table = pq.read_table(scored.scores(1))
    pq.write_table(table.replace_schema_metadata({"sdtrain.clip_model": "another"}), scored.scores(1))
    with pytest.raises(UserError, match="different CLIP networks"):
        scored_images(scored)


def test_embeddings_that_score_stored_are_those_that_are_compared(tmp_path):
    images = [scene_image(i, 128, 128) for i in range(3)]
    dataset = write_downloads(tmp_path, [Fetched(encoded(p)) for p in [*images, images[1]]], per_shard=2)
    score = ScoreConfig(
        clip_model="ViT-demo",
        clip_weights="random:0",
        aesthetic_weights=None,
        watermark_weights=None,
        safety_weights=None,
        store_embeddings=True,
    )
    duplicates = DuplicatesConfig(level="semantic", semantic_threshold=0.99999)
    recipe = Recipe(name="test", score=score, duplicates=duplicates)
    run_batch(SCORE, dataset, recipe, [0, 1])
    assert scored_images(dataset).has_embeddings
    (report,) = run_batch(DEDUP, dataset, recipe, [0])
    assert report.dropped == {"exact": 1}
    assert "semantic 1" in report.notes[0]
