"""Images of the demo's world and their copies, and the stage over a whole dataset."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from filters.dedup import DEDUP
from filters.recipe import DuplicatesConfig, Recipe, ScoreConfig
from filters.score.stage import SCORE
from sdtrain.dataset.manifest import require_entry
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.demo.images import SEEN_PAIRS, draw, random_scene
from sdtrain.download.rows import SCHEMA
from sdtrain.errors import UserError
from sdtrain.images.decode import decode_rgb
from sdtrain.images.perceptual_hash import perceptual_hash
from tests.filters.dedup.duplicate_fixtures import groups_of, table_of
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads

NO_MODELS = ScoreConfig(clip_weights=None, aesthetic_weights=None, watermark_weights=None, safety_weights=None)


def groups_among(images, **settings):
    return groups_of(table_of(images), **settings)


def test_copies_of_copies_are_one_group_named_by_its_smallest_uid():
    steps = [Image.fromarray(np.full((40, 40, 3), 100 + 10 * i, np.uint8)) for i in range(4)]
    assert perceptual_hash(steps[0]) == perceptual_hash(steps[3])
    assert groups_among(steps) == dict.fromkeys(range(4), (0, "perceptual"))


def test_a_level_finds_what_it_says():
    image = scene_image(1, 560, 520)
    near = decode_rgb(encoded(image.resize((588, 546)), quality=78))
    images = [image, scene_image(2, 560, 520), image.copy(), near]
    assert groups_among(images, level="off") == {}
    assert groups_among(images, level="exact") == {0: (0, "exact"), 2: (0, "exact")}
    assert groups_among(images) == {0: (0, "exact"), 2: (0, "exact"), 3: (0, "perceptual")}


def test_different_scenes_of_the_demo_are_no_duplicates_and_its_recompressed_copies_are():
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng, *SEEN_PAIRS[i % len(SEEN_PAIRS)]) for i in range(400)]
    images = [draw(scene, *rng.integers(256, 385, 2).tolist()) for scene in scenes]
    assert groups_among(images) == {}
    copies = [
        decode_rgb(encoded(p.resize((round(p.width * 1.05), round(p.height * 1.05))), quality=78)) for p in images
    ]
    found = groups_among([*images, *copies])
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


def resized(image: Image.Image, factor: float) -> Image.Image:
    return image.resize([round(side * factor) for side in image.size])


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    drawn = [random_scene(rng, *SEEN_PAIRS[i % len(SEEN_PAIRS)]) for i in range(100)]
    return [draw(scene, *rng.integers(128, 257, 2).tolist()) for scene in drawn]


@pytest.mark.parametrize("change", CHANGES)
def test_small_changes_leave_an_image_a_copy(scenes, change):
    make, least = CHANGES[change]
    found = groups_among([*scenes, *map(make, scenes)])
    recall = sum(i in found and found[i] == found.get(len(scenes) + i) for i in range(len(scenes))) / len(scenes)
    print(f"{change}: recall {recall:.2f}")
    assert recall >= least


@pytest.mark.parametrize("change", RECOLOURED)
def test_the_same_shapes_in_other_colours_are_no_copies(scenes, change):
    assert groups_among([*scenes, *map(RECOLOURED[change], scenes)]) == {}


@pytest.mark.parametrize("num", [0, 1])
def test_fewer_than_two_images_have_no_duplicates(num):
    assert groups_among([scene_image(i) for i in range(num)]) == {}


@pytest.fixture
def scored(tmp_path):
    """A dataset of three shards whose images 0, 3 and 8 are the same; one is damaged and one was not fetched."""
    contents = [encoded(scene_image(0 if i in (3, 8) else i)) for i in range(10)]
    rows = [*map(Fetched, contents), Fetched(contents[0][:600]), Fetched(contents[0][:600]), Fetched(None)]
    dataset = write_downloads(tmp_path, rows, per_shard=5)
    run_batch(SCORE, dataset, Recipe(name="test", score=NO_MODELS), [0, 1, 2])
    return dataset


def recipe_with(level: str) -> Recipe:
    return Recipe(name="test", score=NO_MODELS, duplicates=DuplicatesConfig(level=level))


def test_the_stage_counts_copies_across_shards_and_no_damaged_image(scored):
    (report,) = run_batch(DEDUP, scored, recipe_with("perceptual"), [0])
    assert (report.num_in, report.num_out, report.dropped) == (10, 8, {"exact": 2})
    rows = pq.read_table(scored.duplicates).to_pylist()
    uids = [row["uid"] for row in rows]
    assert len(rows) == 3
    assert uids == sorted(uids)
    assert {row["group_id"] for row in rows} == {uids[0]}


def test_dedup_does_nothing_twice_gives_the_same_bytes_and_notices_another_level(scored, digests):
    recipe = recipe_with("perceptual")
    run_batch(DEDUP, scored, recipe, [0])
    assert pending(DEDUP, scored, recipe) == []
    before = digests(scored)
    run_batch(DEDUP, scored, recipe, [0])
    assert digests(scored) == before
    off = recipe_with("off")
    assert pending(DEDUP, scored, off) == [0]
    run_batch(DEDUP, scored, off, [0])
    assert pq.read_table(scored.duplicates).num_rows == 0
    assert require_entry(scored, "dedup", 0).dropped == {}


@pytest.mark.parametrize("level", ["off", "exact", "perceptual"])
def test_the_report_says_what_each_level_would_drop_whatever_the_recipe_asks_for(scored, level):
    (report,) = run_batch(DEDUP, scored, recipe_with(level), [0])
    assert report.notes == [
        "of 10 images, each level of duplicates would drop: exact 2, perceptual 2; semantic not counted"
    ]


def test_a_file_that_was_decoded_differently_is_the_same_by_its_bytes(scored):
    # As two servers' img2dataset shards have it, one of which was re-encoded.
    table = pq.read_table(scored.images_table(0)).to_pylist()
    table[1]["sha256"] = table[2]["sha256"]
    pq.write_table(pq.read_table(scored.images_table(0)).from_pylist(table, SCHEMA), scored.images_table(0))
    (report,) = run_batch(DEDUP, scored, recipe_with("exact"), [0])
    assert report.dropped == {"exact": 3}


def test_shards_that_were_decoded_differently_are_not_compared(scored):
    table = pq.read_table(scored.scores(1))
    described = {**(table.schema.metadata or {}), b"sdtrain.decode": b"gpu"}
    pq.write_table(table.replace_schema_metadata(described), scored.scores(1))
    with pytest.raises(UserError, match=r"decoded by the CPU and others by a GPU.*Set score\.decode to cpu or gpu"):
        run_batch(DEDUP, scored, recipe_with("exact"), [0])
    run_batch(DEDUP, scored, recipe_with("off"), [0])


def test_nothing_is_left_beside_the_table(scored):
    run_batch(DEDUP, scored, recipe_with("perceptual"), [0])
    assert not list(scored.root.glob(".*"))
