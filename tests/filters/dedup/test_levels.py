"""Which groups come out: what comparing all with all gives, in any order, in pieces of any size, in bounded memory."""

import os
import sys
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.dedup import DEDUP, clusters, levels, ordering, perceptual, union_find
from filters.dedup.clusters import num_clusters_for
from filters.dedup.columns import COLOR_BYTES
from filters.dedup.perceptual import MAX_COLOR_DIFFERENCE
from filters.dedup.stage import scored_images
from filters.dedup.union_find import Components
from filters.recipe import DuplicatesConfig, Recipe, ScoreConfig
from filters.score.stage import SCORE
from sdtrain.dataset.progress import progress_listener
from sdtrain.dataset.stage import run_batch
from sdtrain.errors import UserError
from tests.filters.dedup.duplicate_fixtures import (
    alike,
    distinct_colors,
    groups_by_brute_force,
    groups_of,
    looks_table,
    planted_hashes,
    search,
    with_embeddings,
)
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads

RADIUS = 4


def equal(values: list[object]) -> np.ndarray:
    """(N, N) whether values are equal and known."""
    return np.array([[a == b and a is not None for b in values] for a in values]).reshape(len(values), len(values))


def crowded_looks(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Few hashes and few colours, so that many images share one or both, or nearly."""
    rng = np.random.default_rng(seed)
    hashes = rng.choice(planted_hashes(40, seed), num)
    colors = np.zeros((num, COLOR_BYTES), np.uint8)
    colors[:, :4] = rng.integers(0, 3, (num, 4)) * rng.choice([9, 16, 17], (num, 1))
    return hashes, colors


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_those_of_comparing_all_with_all(seed):
    hashes, colors = crowded_looks(300, seed)
    expected = groups_by_brute_force([np.eye(300, dtype=bool), alike(hashes, colors, RADIUS)])
    assert groups_of(looks_table(hashes, colors), radius=RADIUS) == expected


def test_pieces_of_any_size_give_the_same_groups(monkeypatch):
    hashes, colors = crowded_looks(300, 9)
    pixels = (np.arange(300) % 290).tolist()
    expected = groups_of(looks_table(hashes, colors, pixels))
    for module, name, size in (
        (ordering, "_ROWS_AT_ONCE", 13),
        (levels, "_ROWS_AT_ONCE", 11),
        (union_find, "_ROWS_AT_ONCE", 7),
        (perceptual, "_CHUNK_PAIRS", 5),
        (perceptual, "_LARGE_RUN", 3),
    ):
        monkeypatch.setattr(module, name, size)
        assert groups_of(looks_table(hashes, colors, pixels)) == expected


@st.composite
def small_worlds(draw):
    """A few images, many of which share pixels, files, looks or embeddings, and an order in which to give them."""
    num = draw(st.integers(1, 14))
    of = lambda values: draw(st.lists(values, min_size=num, max_size=num))  # noqa: E731
    bits = of(st.sampled_from([0, 0b1, 0b11, 0b11111, 0b111111111, 1 << 63, (1 << 63) | 1]))
    shades = np.array(of(st.sampled_from([0, 10, 16, 17, 30, 33, 200])), np.uint8)
    angles = np.array(of(st.sampled_from([0.0, 0.2, 0.3, 0.5, 1.5, 3.0])))
    return {
        "hashes": np.array(bits, np.uint64),
        "colors": np.repeat(shades[:, None], COLOR_BYTES, axis=1),
        "pixels": of(st.integers(0, 12)),
        "files": of(st.one_of(st.none(), st.integers(0, 12))),
        "vectors": np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16),
        "order": draw(st.permutations(range(num))),
        "level": draw(st.sampled_from(["exact", "perceptual", "semantic"])),
    }


@given(small_worlds())
@settings(max_examples=20, deadline=None)
def test_groups_are_the_components_of_the_relation_in_whatever_order_images_come(world):
    table = looks_table(world["hashes"], world["colors"], world["pixels"], world["files"])
    table = with_embeddings(table, world["vectors"])
    wide = world["vectors"].astype(float)
    cosines = wide @ wide.T / np.linalg.norm(wide, axis=1) / np.linalg.norm(wide, axis=1)[:, None]
    relations = [
        equal(world["pixels"]) | equal(world["files"]),
        alike(world["hashes"], world["colors"], RADIUS),
        cosines >= 0.97,
    ]
    levels = ("exact", "perceptual", "semantic")
    expected = groups_by_brute_force(relations[: 1 + levels.index(world["level"])])
    options = {"level": world["level"], "radius": RADIUS, "semantic_threshold": 0.97}
    assert groups_of(table, **options) == expected
    mixed = table.take(pa.array(world["order"]))
    assert search(mixed.slice(0, 3), mixed.slice(3), **options) == search(table, **options)


@given(st.lists(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=8), max_size=6))
def test_components_do_not_depend_on_how_links_are_split(batches):
    at_once, one_by_one = Components(20), Components(20)
    pairs = [pair for batch in batches for pair in batch]
    if pairs:
        at_once.link(*np.array(pairs).T)
    for pair in reversed(pairs):
        one_by_one.link(*np.array([pair]).T)
    nodes = np.arange(20)
    assert at_once.roots(nodes).tolist() == one_by_one.roots(nodes).tolist()
    assert at_once.num_linked == one_by_one.num_linked == 20 - len(set(at_once.roots(nodes).tolist()))
    assert np.flatnonzero(at_once.grouped()).tolist() == sorted(
        {i for pair in pairs if pair[0] != pair[1] for i in pair}
    )


def test_colours_decide_between_images_of_one_hash():
    colors = np.zeros((4, COLOR_BYTES), np.uint8)
    colors[1, 7], colors[2, 7], colors[3] = MAX_COLOR_DIFFERENCE, MAX_COLOR_DIFFERENCE + 1, 255
    # 1 and 2 are alike too, so the three are one group; the fourth is not.
    found = groups_of(looks_table(np.full(4, 5, np.uint64), colors), radius=0)
    assert found == dict.fromkeys(range(3), (0, "perceptual"))


def test_each_level_counts_what_it_would_drop_and_the_kinds_add_up_to_that_of_the_recipe():
    hashes, colors = crowded_looks(300, 3)
    table = looks_table(hashes, colors, (np.arange(300) % 280).tolist())
    (found, rows), (off, none) = search(table), search(table, level="off")
    groups = {row["group_id"] for row in rows}
    assert found.removed == off.removed
    assert found.removed["exact"] == 20
    assert found.removed["perceptual"] == sum(found.dropped.values()) == len(rows) - len(groups)
    assert (off.dropped, none) == ({}, [])


@pytest.mark.parametrize("alike_", [False, True], ids=["all unlike", "all alike"])
def test_images_of_one_hash_and_many_colours_take_memory_by_their_number(alike_):
    num = 4000
    colors = (
        np.random.default_rng(0).integers(250, 256, (num, COLOR_BYTES), np.uint8) if alike_ else distinct_colors(num)
    )
    table = looks_table(np.full(num, 1 << 63, np.uint64), colors)
    tracemalloc.start()
    found, _ = search(table)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.removed["perceptual"] == (num - 1 if alike_ else 0)
    assert peak_bytes < 50_000_000


def test_thousands_of_blank_images_cost_no_square():
    num = 50_000
    hashes = np.concatenate([np.full(num, 1 << 63, np.uint64), planted_hashes(200, 1)])
    colors = np.concatenate([np.full((num, COLOR_BYTES), 255, np.uint8), np.zeros((200, COLOR_BYTES), np.uint8)])
    table = looks_table(hashes, colors)
    started = time.perf_counter()
    found = groups_of(table)
    assert time.perf_counter() - started < 5
    assert [found[i][0] for i in range(num)] == [0] * num


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
    steps = ("reading", "equal pixels", "equal bytes", "near hashes", "clusters by embedding", "pairs by embedding")
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
