import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_fixtures import Fetched, encoded, scene_picture, write_downloads
from PIL import Image
from scipy.sparse.csgraph import connected_components

from filters.duplicates import DEDUP, MAX_COLOR_DIFFERENCE, alike_pairs, exact_pairs, group_pictures, perceptual_pairs
from filters.inputs import perceptual_hash, pixel_sha256, thumbnail
from filters.recipe import DuplicatesConfig, Recipe, ScoreConfig
from filters.scores import SCORE
from sdtrain.data.manifest import require_entry
from sdtrain.data.pictures import decode_rgb
from sdtrain.data.stage import pending, run_batch
from sdtrain.demo.pictures import SEEN_PAIRS, draw, random_scene

NUM_COLORS = 48
DEMO_RADIUS = 4


def planted_hashes(num: int, seed: int) -> np.ndarray:
    """Random 64-bit hashes, half of which are others with 0 to 20 bits flipped."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, num, dtype=np.uint64)
    for i in range(num // 2, num):
        flipped = rng.choice(64, int(rng.integers(0, 21)), replace=False)
        hashes[i] = hashes[int(rng.integers(num // 2))] ^ np.uint64(sum(1 << int(bit) for bit in flipped))
    return hashes


def brute_force(hashes: np.ndarray, radius: int) -> list[tuple[int, int]]:
    close = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= radius
    return [(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(close, 1)), strict=True)]


def table_of(pictures: list[Image.Image]) -> pa.Table:
    return pa.table({
        "uid": [f"{i:032x}" for i in range(len(pictures))],
        "pixel_sha256": [pixel_sha256(p) for p in pictures],
        "phash": pa.array([perceptual_hash(p) for p in pictures], pa.int64()),
        "thumbnail": [thumbnail(p) for p in pictures],
    })  # fmt: skip


def groups_of(pictures: list[Image.Image], level: str = "perceptual", radius: int = DEMO_RADIUS) -> dict[int, tuple]:
    """Picture number -> (number of its group's first, kind)."""
    rows = group_pictures(table_of(pictures), level, radius).to_pylist()
    return {int(row["uid"], 16): (int(row["group_id"], 16), row["kind"]) for row in rows}


@pytest.mark.parametrize("radius", [*range(7), 10, 16])
def test_no_pair_within_the_radius_is_missed_and_none_beyond_is_found(radius):
    hashes = planted_hashes(5000, seed=radius)
    expected = brute_force(hashes, radius)
    assert len(expected) > 50
    assert [tuple(pair) for pair in perceptual_pairs(hashes, radius).tolist()] == expected


def test_exact_pairs_link_each_copy_to_the_first():
    assert exact_pairs(["a", "b", "a", "c", "b", "a"]).tolist() == [[0, 2], [1, 4], [0, 5]]


def test_colours_decide_between_pictures_of_one_hash():
    hashes = np.array([5, 5, 5, 5], np.uint64)
    colors = np.zeros((4, NUM_COLORS), np.uint8)
    colors[1, 7], colors[2, 7], colors[3] = MAX_COLOR_DIFFERENCE, MAX_COLOR_DIFFERENCE + 1, 255
    # 1 and 2 are alike too, so the three are one group; the fourth is not.
    assert sorted(map(tuple, np.sort(alike_pairs(hashes, colors, 0)).tolist())) == [(0, 1), (1, 2)]


def test_copies_of_copies_are_one_group_named_by_its_smallest_uid():
    steps = [Image.fromarray(np.full((40, 40, 3), 100 + 10 * i, np.uint8)) for i in range(4)]
    assert perceptual_hash(steps[0]) == perceptual_hash(steps[3])
    assert groups_of(steps) == dict.fromkeys(range(4), (0, "perceptual"))


def test_a_level_finds_what_it_says():
    picture = scene_picture(1, 560, 520)
    near = decode_rgb(encoded(picture.resize((588, 546)), quality=78))
    pictures = [picture, scene_picture(2, 560, 520), picture.copy(), near]
    assert groups_of(pictures, "off") == {}
    assert groups_of(pictures, "exact") == {0: (0, "exact"), 2: (0, "exact")}
    assert groups_of(pictures) == {0: (0, "exact"), 2: (0, "exact"), 3: (0, "perceptual")}


def test_different_scenes_of_the_demo_are_no_duplicates_and_its_recompressed_copies_are():
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng, *SEEN_PAIRS[i % len(SEEN_PAIRS)]) for i in range(400)]
    pictures = [draw(scene, *rng.integers(256, 385, 2).tolist()) for scene in scenes]
    assert groups_of(pictures) == {}
    copies = [
        decode_rgb(encoded(p.resize((round(p.width * 1.05), round(p.height * 1.05))), quality=78)) for p in pictures
    ]
    found = groups_of([*pictures, *copies])
    together = [i for i in range(400) if i in found and found[i] == found.get(400 + i)]
    assert len(together) >= 392
    assert all(first == i % 400 for i, (first, _) in found.items())


# Change -> the least share found. Not all are: of symmetric scenes many DCT coefficients are about the median, and
# their hash differs by 6 to 17 bits after any change, which no radius that tells scenes apart can bridge.
CHANGES = {
    "JPEG 95": (lambda p: decode_rgb(encoded(p)), 0.95),
    "JPEG 75": (lambda p: decode_rgb(encoded(p, quality=75)), 0.94),
    "JPEG 50": (lambda p: decode_rgb(encoded(p, quality=50)), 0.9),
    "WebP 70": (lambda p: decode_rgb(encoded(p, "webp", quality=70)), 0.85),
    "size x 0.5": (lambda p: resized(p, 0.5), 0.95),
    "size x 0.9": (lambda p: resized(p, 0.9), 0.95),
    "size x 1.05, JPEG 78": (lambda p: decode_rgb(encoded(resized(p, 1.05), quality=78)), 0.95),
}
RECOLOURED = {
    "channels exchanged": lambda p: Image.merge("RGB", [*p.split()[1:], p.split()[0]]),
    "grey": lambda p: p.convert("L").convert("RGB"),
}


def resized(picture: Image.Image, factor: float) -> Image.Image:
    return picture.resize([round(side * factor) for side in picture.size])


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    drawn = [random_scene(rng, *SEEN_PAIRS[i % len(SEEN_PAIRS)]) for i in range(100)]
    return [draw(scene, *rng.integers(128, 257, 2).tolist()) for scene in drawn]


@pytest.mark.parametrize("change", CHANGES)
def test_small_changes_leave_a_picture_a_copy(scenes, change):
    make, least = CHANGES[change]
    found = groups_of([*scenes, *map(make, scenes)])
    recall = sum(i in found and found[i] == found.get(len(scenes) + i) for i in range(len(scenes))) / len(scenes)
    print(f"{change}: recall {recall:.2f}")
    assert recall >= least


@pytest.mark.parametrize("change", RECOLOURED)
def test_the_same_shapes_in_other_colours_are_no_copies(scenes, change):
    assert groups_of([*scenes, *map(RECOLOURED[change], scenes)]) == {}


@pytest.mark.parametrize("seed", range(5))
def test_links_connect_exactly_what_all_alike_pairs_connect(seed):
    rng = np.random.default_rng(seed)
    # Few hashes and few colours, so that many pictures share one or both.
    hashes = rng.choice(planted_hashes(40, seed), 300)
    colors = (rng.integers(0, 3, (300, 4)) * rng.choice([9, 16, 17], (300, 1))).astype(np.uint8)
    close = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= DEMO_RADIUS
    alike = close & (np.abs(colors[:, None].astype(int) - colors[None, :]).max(axis=2) <= MAX_COLOR_DIFFERENCE)
    links = alike_pairs(hashes, colors, DEMO_RADIUS)
    linked = np.zeros_like(alike)
    linked[links[:, 0], links[:, 1]] = True
    assert not (linked & ~alike).any()
    (num, expected), (num_found, found) = (connected_components(a, directed=False) for a in (alike, linked))
    assert num == num_found
    assert np.array_equal(expected, found)


@pytest.mark.parametrize("lowest", [0, 250], ids=["all unlike", "all alike"])
def test_pictures_of_one_hash_and_many_colours_take_memory_by_their_number(lowest):
    num = 4000
    colors = np.random.default_rng(0).integers(lowest, 256, (num, NUM_COLORS), dtype=np.uint8)
    tracemalloc.start()
    links = alike_pairs(np.full(num, 1 << 63, np.uint64), colors, DEMO_RADIUS)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(links) == (num - 1 if lowest else 0)
    assert peak_bytes < 50_000_000


def test_thousands_of_blank_pictures_cost_no_square():
    num = 50_000
    hashes = np.concatenate([np.full(num, 1 << 63, np.uint64), planted_hashes(200, 1)])
    colors = np.concatenate([np.full((num, NUM_COLORS), 255, np.uint8), np.zeros((200, NUM_COLORS), np.uint8)])
    started = time.perf_counter()
    pairs = alike_pairs(hashes, colors, DEMO_RADIUS)
    assert time.perf_counter() - started < 5
    assert len(pairs[pairs[:, 1] < num]) == num - 1


@pytest.mark.parametrize("num", [0, 1])
def test_fewer_than_two_pictures_have_no_duplicates(num):
    assert groups_of([scene_picture(i) for i in range(num)]) == {}


NO_MODELS = ScoreConfig(clip_weights=None, aesthetic_weights=None, watermark_weights=None, safety_weights=None)


@pytest.fixture
def scored(tmp_path):
    """A dataset of three shards whose pictures 0, 3 and 8 are the same; one is damaged and one was not fetched."""
    contents = [encoded(scene_picture(0 if i in (3, 8) else i)) for i in range(10)]
    rows = [*map(Fetched, contents), Fetched(contents[0][:600]), Fetched(contents[0][:600]), Fetched(None)]
    dataset = write_downloads(tmp_path, rows, per_shard=5)
    run_batch(SCORE, dataset, Recipe(name="test", score=NO_MODELS), [0, 1, 2])
    return dataset


def test_the_stage_counts_copies_across_shards_and_no_damaged_picture(scored):
    recipe = Recipe(name="test", score=NO_MODELS, duplicates=DuplicatesConfig(level="perceptual"))
    (report,) = run_batch(DEDUP, scored, recipe, [0])
    assert (report.num_in, report.num_out, report.dropped) == (10, 8, {"exact": 2})
    rows = pq.read_table(scored.duplicates).to_pylist()
    uids = [row["uid"] for row in rows]
    assert len(rows) == 3
    assert uids == sorted(uids)
    assert {row["group_id"] for row in rows} == {uids[0]}


def test_dedup_does_nothing_twice_gives_the_same_bytes_and_notices_another_level(scored, digests):
    recipe = Recipe(name="test", score=NO_MODELS, duplicates=DuplicatesConfig(level="perceptual"))
    run_batch(DEDUP, scored, recipe, [0])
    assert pending(DEDUP, scored, recipe) == []
    before = digests(scored)
    run_batch(DEDUP, scored, recipe, [0])
    assert digests(scored) == before
    off = recipe.model_copy(update={"duplicates": DuplicatesConfig(level="off")})
    assert pending(DEDUP, scored, off) == [0]
    run_batch(DEDUP, scored, off, [0])
    assert pq.read_table(scored.duplicates).num_rows == 0
    assert require_entry(scored, "dedup", 0).dropped == {}
