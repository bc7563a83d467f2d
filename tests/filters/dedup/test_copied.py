"""Copies by SSCD's embeddings: planted ones, a search by clusters beside one by all pairs, and the stage."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from filters.decide.stage import DECIDE
from filters.dedup import DEDUP, clusters, similar
from filters.dedup.levels import LEVELS
from filters.dedup.stage import scored_images
from filters.recipe import DuplicatesConfig, Recipe, ScoreConfig
from filters.score.stage import SCORE
from sdtrain.dataset.progress import progress_listener
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.errors import UserError
from sdtrain.images.miniature import MINIATURE_BYTES
from tests.filters.dedup.duplicate_fixtures import (
    distinct_colors,
    groups_of,
    looks_table,
    search,
    uid_of,
    with_embeddings,
)
from tests.filters.sscd_fixtures import Published, write_scripted
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads

NUM, WIDTH, NUM_COPIES = 2000, 128, 200
NO_MODELS = dict.fromkeys(("clip_weights", "aesthetic_weights", "watermark_weights", "safety_weights"))
EXPECTED = {i: (i % (NUM - NUM_COPIES), "copied") for i in (*range(NUM_COPIES), *range(NUM - NUM_COPIES, NUM))}


def sphere(rng: np.random.Generator, num: int) -> np.ndarray:
    vectors = rng.standard_normal((num, WIDTH))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def planted(cosine: float = 0.78) -> pa.Table:
    """Embeddings anywhere on the sphere, as SSCD's lie; the last two hundred have `cosine` with the first."""
    rng = np.random.default_rng(3)
    vectors = sphere(rng, NUM)
    originals, noise = vectors[:NUM_COPIES], sphere(rng, NUM_COPIES)
    noise -= (noise * originals).sum(axis=1, keepdims=True) * originals
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    vectors[-NUM_COPIES:] = cosine * originals + np.sqrt(1 - cosine**2) * noise
    hashes = rng.integers(0, 2**64, NUM, dtype=np.uint64)
    return with_embeddings(looks_table(hashes, distinct_colors(NUM)), vectors, "sscd_embedding")


def copied(*tables: pa.Table, **settings) -> dict[int, tuple[int, str]]:
    return groups_of(*tables, level="copied", **settings)


def test_copies_are_above_the_limit_and_others_are_not():
    assert copied(planted()) == EXPECTED
    assert copied(planted(0.74)) == {}
    assert copied(planted(0.74), copy_similarity=0.73) == EXPECTED


def test_clusters_of_several_nearest_centres_lose_few_copies_though_nothing_clusters():
    pytest.importorskip("faiss")
    found = copied(planted(), num_clusters=45)
    assert found.items() <= EXPECTED.items()
    assert len(found) >= 0.95 * len(EXPECTED)
    by_clip = planted().rename_columns({"sscd_embedding": "embedding"})
    nearest_only = groups_of(by_clip, level="semantic", semantic_threshold=0.75, num_clusters=45)
    assert len(nearest_only) < 0.8 * len(EXPECTED), "else one cluster for each would do"


def test_equal_embeddings_are_compared_as_one_with_the_same_groups(monkeypatch):
    table = planted().take([*range(NUM), *[3] * 300, *[NUM - NUM_COPIES + 3] * 200])
    table = table.set_column(0, "uid", [[uid_of(i) for i in range(len(table))]])
    compared = []
    original = similar._proposed
    monkeypatch.setattr(
        similar, "_proposed", lambda vectors, least: compared.append(len(vectors)) or original(vectors, least)
    )
    found = copied(table, radius=0)
    assert compared == [NUM]
    assert {i for i, (first, _) in found.items() if first == 3} == {3, NUM - NUM_COPIES + 3, *range(NUM, NUM + 500)}
    assert len(found) == len(EXPECTED) + 500


def test_embeddings_of_zeros_are_like_none_not_even_each_other():
    table = looks_table(np.array([0, 2**40 - 1, 2**63 - 1], np.uint64), distinct_colors(3))
    assert copied(with_embeddings(table, np.zeros((3, 8)), "sscd_embedding")) == {}


@pytest.mark.parametrize("num_threads", [1, 3])
def test_groups_depend_on_neither_threads_nor_order_nor_the_division_into_files(num_threads, monkeypatch):
    pytest.importorskip("faiss")
    table = planted(0.76)
    expected = search(table, level="copied", num_clusters=45)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(num_threads))
    monkeypatch.setattr(clusters, "_ROWS_PER_BUCKET", 1000)
    mixed = table.take(pa.array(np.random.default_rng(num_threads).permutation(NUM)))
    parts = [mixed.slice(0, 1), mixed.slice(1, 0), mixed.slice(1, 700), mixed.slice(701)]
    assert search(*parts, level="copied", num_clusters=45) == expected


def test_all_levels_include_it_where_the_embeddings_are_stored():
    table = planted().take([*range(20), *range(NUM - NUM_COPIES, NUM - NUM_COPIES + 20)])
    table = with_embeddings(table, np.eye(40, dtype=np.float16))
    noise = np.random.default_rng(0).integers(0, 256, (40, MINIATURE_BYTES), np.uint8)
    table = table.append_column("miniature", pa.array([row.tobytes() for row in noise], pa.binary(MINIATURE_BYTES)))
    found, rows = search(table, level="all")
    assert list(found.removed) == ["exact", "perceptual", "altered", "copied", "semantic"]
    assert (found.dropped, {row["kind"] for row in rows}, len(rows)) == ({"copied": 20}, {"copied"}, 40)
    assert search(table.drop_columns(["sscd_embedding"]), level="all")[1] == []


def test_every_step_says_how_far_it_is():
    pytest.importorskip("faiss")
    heard = dict[str, tuple[int, int]]()
    with progress_listener(lambda step: heard.update({step.name: (step.done, step.total)})):
        search(planted(), level="copied", num_clusters=45)
    assert heard["dedup: clusters by sscd_embedding"] == (NUM, NUM)
    assert heard["dedup: pairs by sscd_embedding"] == (8 * NUM, 8 * NUM)


def test_what_it_would_drop_is_told_where_few_embeddings_are_stored_and_nothing_else_changes():
    found, rows = search(planted(), level="perceptual")
    assert (found.removed, found.dropped, rows) == ({"exact": 0, "perceptual": 0, "copied": NUM_COPIES}, {}, [])
    clip = with_embeddings(planted(), np.eye(NUM, 2048, dtype=np.float16))
    assert search(clip, level="semantic")[1] == [], "copies are no semantic ones"


def test_each_level_has_a_reason_that_explains_what_it_drops():
    assert DECIDE.drops is not None
    assert [f"duplicate_{level}" for level in LEVELS] == [name for name in DECIDE.drops.last if "duplicate" in name]


def test_without_embeddings_a_sentence_says_what_to_set():
    with pytest.raises(UserError, match=r"level: copied compares SSCD's embeddings.*score\.sscd_weights"):
        copied(planted().drop_columns(["sscd_embedding"]))
    with pytest.raises(ValueError, match=r"level: copied compares SSCD's embeddings\. Set score\.sscd_weights"):
        Recipe(name="test", duplicates=DuplicatesConfig(level="copied"))


def test_its_limit_is_no_part_of_what_is_recorded_of_other_levels():
    earlier = {"level", "radius", "semantic_threshold", "num_clusters", "seed"}
    assert set(DuplicatesConfig(level="semantic").described(has_sscd=True)) == earlier
    assert set(DuplicatesConfig(level="copied").described(has_sscd=True)) == earlier | {"copy_similarity"}
    altered = {"altered_agreement", "overlaid_agreement"}
    assert set(DuplicatesConfig(level="all").described(has_sscd=False)) == earlier | altered
    assert set(DuplicatesConfig(level="all").described(has_sscd=True)) == earlier | altered | {"copy_similarity"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("sscd") / "sscd_disc_mixup.torchscript.pt"
    write_scripted(path, Published())
    return str(path)


def recipe_of(weights: str | None, **duplicates) -> Recipe:
    score = ScoreConfig(**NO_MODELS, sscd_weights=weights)
    return Recipe(name="test", score=score, duplicates=DuplicatesConfig(**duplicates))


@pytest.fixture
def scored(tmp_path, weights):
    """Two shards of four images, of which 1 and 6 are the same drawing, recompressed."""
    images = [scene_image(1 if i == 6 else i, 320, 320) for i in range(8)]
    contents = [encoded(image, quality=50 if i == 6 else 95) for i, image in enumerate(images)]
    dataset = write_downloads(tmp_path, [Fetched(content) for content in contents], per_shard=4)
    run_batch(SCORE, dataset, recipe_of(weights), [0, 1])
    return dataset


def test_the_stage_compares_what_score_stored(scored, weights):
    tables = [pq.read_table(scored.scores(shard), columns=["uid", "sscd_embedding"]) for shard in (0, 1)]
    stored = pa.concat_tables(tables)
    vectors = np.array(stored["sscd_embedding"].to_pylist(), np.float64)
    cosines = vectors @ vectors.T / np.outer(*[np.linalg.norm(vectors, axis=1)] * 2)
    np.fill_diagonal(cosines, 0)
    assert np.unravel_index(cosines.argmax(), cosines.shape) == (1, 6)
    second = np.partition(cosines.ravel(), -3)[-3]
    limit = float((cosines.max() + second) / 2)
    recipe = recipe_of(weights, level="copied", copy_similarity=limit, radius=0)
    (report,) = run_batch(DEDUP, scored, recipe, [0])
    assert sum(report.dropped.values()) == 1
    uids = [stored["uid"][i].as_py() for i in (1, 6)]
    assert pq.read_table(scored.duplicates)["uid"].to_pylist() == sorted(uids)
    assert pending(DEDUP, scored, recipe_of(weights, level="copied", copy_similarity=limit / 2, radius=0)) == [0]


def test_embeddings_of_different_weights_are_refused(scored):
    table = pq.read_table(scored.scores(1))
    metadata = {**table.schema.metadata, b"sdtrain.sscd_digest": b"another"}
    pq.write_table(table.replace_schema_metadata(metadata), scored.scores(1))
    with pytest.raises(UserError, match="different SSCD networks"):
        scored_images(scored)
