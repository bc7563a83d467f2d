"""Copies that people would call copies: mirrored, cropped, watermarked; and images that only look alike."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from filters.decide.stage import DECIDE
from filters.dedup import DEDUP, altered, proposals
from filters.dedup.comparison import Limits, are_confirmed, are_copies
from filters.dedup.stage import scored_images
from filters.recipe import DuplicatesConfig, Recipe, ScoreConfig
from filters.score.stage import SCORE
from sdtrain.dataset.manifest import require_entry
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.errors import UserError
from sdtrain.images.miniature import Planes, miniature, planes_of
from tests.benchmarks.look_alikes import KINDS, texture
from tests.benchmarks.planted import CHANGES
from tests.filters.dedup.duplicate_fixtures import groups_of, search, squashed, table_of, uid_of
from tests.image_fixtures import Fetched, encoded, scene_image, write_downloads

NUM = 40
ALTERED = ("cropped 5 %", "watermarked", "mirrored")


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [texture(i) if i % 2 else scene_image(i, 280, 256) for i in range(NUM)]


@pytest.fixture(scope="module")
def tables(images) -> dict[str, pa.Table]:
    """The table of all images, as "", and those of their copies by change."""
    copies = {change: [CHANGES[change](image) for image in images] for change in ALTERED}
    return {name: table_of(some) for name, some in {"": images, **copies}.items()}


def renamed(table: pa.Table, first: int) -> pa.Table:
    uids = pa.array([uid_of(first + i) for i in range(len(table))])
    return table.set_column(table.column_names.index("uid"), "uid", uids)


@pytest.mark.parametrize("change", ALTERED)
def test_copies_are_found_that_hashes_miss(tables, change):
    both = [tables[""], renamed(tables[change], NUM)]
    found, before = groups_of(*both, level="altered"), groups_of(*both, level="perceptual")
    together = [
        sum(i in groups and groups[i][0] == groups.get(NUM + i, (-1,))[0] for i in range(NUM))
        for groups in (found, before)
    ]
    print(f"{change}: {together[0]} of {NUM}, by their hashes {together[1]}")
    assert together[0] >= 0.9 * NUM > together[1]
    assert all(first == i % NUM for i, (first, _) in found.items()), "no two different images are one group"
    assert before.items() <= found.items() or change == "mirrored"


def slide(rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (256, 256), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    for line in range(9):
        text = "".join(rng.choice(list("abcdefghi    "), int(rng.integers(6, 26))))
        pen.text((14, 12 + 26 * line), text, fill=(20, 20, 20), font=ImageFont.load_default(18))
    return image


def disc(rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (256, 256), (250, 250, 250))
    radius, color = rng.uniform(50, 110), tuple(rng.integers(30, 220, 3).tolist())
    ImageDraw.Draw(image).ellipse((128 - radius, 128 - radius, 128 + radius, 128 + radius), fill=color)
    return image


def nearly_blank(rng: np.random.Generator) -> Image.Image:
    shades = np.linspace(*rng.uniform(60, 250, 2), 256)[:, None, None] + rng.normal(0, 1.5, (256, 256, 3))
    return Image.fromarray(shades.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("draw", [slide, disc, nearly_blank])
def test_images_that_only_look_alike_are_no_copies(draw):
    rng = np.random.default_rng(1)
    table = table_of([draw(rng) for _ in range(30)])
    kinds = [kind for _, kind in groups_of(table, level="altered").values()]
    assert "altered" not in kinds


def zoomed(image: Image.Image) -> Image.Image:
    return image.crop((2, 2, image.width - 2, image.height - 2))


def logo(image: Image.Image) -> Image.Image:
    """Two colours in a corner, of which one is brighter than the image and the other darker."""
    image = image.copy()
    ImageDraw.Draw(image).rectangle((208, 208, 247, 247), fill="white")
    ImageDraw.Draw(image).rectangle((216, 216, 239, 239), fill="black")
    return image


@pytest.mark.parametrize("change", [zoomed, lambda image: image.filter(ImageFilter.UnsharpMask(2, 100, 2)), logo])
def test_pixels_accept_mild_copies(change):
    photos = [texture(i) for i in range(20)]
    ones, others = (
        planes_of(np.stack([np.frombuffer(miniature(squashed(image)), np.uint8) for image in images]))
        for images in (photos, [change(photo) for photo in photos])
    )
    assert are_copies(ones, others, np.zeros(20, bool), Limits(0.88, 0.9)).sum() >= 19


@pytest.mark.parametrize("kind", ["illustrated slides", "memes of one picture", "bottles", "frames of one scene"])
def test_other_content_in_the_same_frame_is_no_copy(kind):
    rng = np.random.default_rng(5)
    images = [KINDS[kind](rng, 6 * i) for i in range(16)]  # all of one template
    miniatures = np.stack([np.frombuffer(miniature(squashed(image)), np.uint8) for image in images])
    ones, others = np.triu_indices(len(images), 1)
    found = are_copies(
        planes_of(miniatures[ones]), planes_of(miniatures[others]), np.zeros(len(ones), bool), Limits(0.88, 0.9)
    )
    assert found.sum() <= 1, "of 120 pairs"


def test_pixels_part_those_of_one_template_whose_hashes_are_near_at_a_bounded_cost(monkeypatch):
    rng = np.random.default_rng(5)
    table = table_of([KINDS["certificates"](rng, 6 * i) for i in range(30)])
    assert len(groups_of(table)) > 20, "at the level perceptual"
    compared = list[int]()

    def count(ones: Planes, others: Planes, limits: Limits) -> np.ndarray:
        compared.append(len(ones.luma))
        return are_confirmed(ones, others, limits)

    monkeypatch.setattr(altered, "are_confirmed", count)
    assert groups_of(table, level="altered") == {}
    without_limit = sum(compared)
    compared.clear()
    monkeypatch.setattr(altered, "_MAX_REFUSED", 4)
    monkeypatch.setattr(altered, "_PROPOSED_AT_ONCE", 8)
    groups_of(table, level="altered")
    assert sum(compared) < without_limit / 2


def test_neighbouring_views_of_one_scene_are_no_copies():
    wide = Image.fromarray(np.concatenate([np.asarray(texture(i)) for i in (1, 2)], axis=1))
    views = [wide.crop((left, 0, left + 256, 256)) for left in range(0, 257, 64)]
    assert groups_of(table_of(views), level="altered") == {}


def test_groups_depend_neither_on_the_order_of_images_nor_on_the_size_of_pieces(tables, monkeypatch):
    table = pa.concat_tables([tables[""], renamed(tables["cropped 5 %"], NUM), renamed(tables["mirrored"], 2 * NUM)])
    expected = search(table, level="altered")
    mixed = table.take(pa.array(np.random.default_rng(0).permutation(len(table))))
    for module, name, size in (
        *((altered, "_PAIRS_AT_ONCE", 7), (altered, "_PROPOSED_AT_ONCE", 20), (altered, "_IMAGES_AT_ONCE", 11)),
        *((proposals, "_ROWS_AT_ONCE", 64), (proposals, "_ROWS_IN_CACHE", 32)),
    ):
        monkeypatch.setattr(module, name, size)
    assert search(mixed.slice(0, 3), mixed.slice(3), level="altered") == expected


def test_other_levels_do_what_they_did_whether_there_are_miniatures_or_not(tables):
    both = pa.concat_tables([tables[""], renamed(tables["cropped 5 %"], NUM)])
    for level in ("off", "exact", "perceptual"):
        assert search(both, level=level) == search(both.drop_columns(["miniature"]), level=level)
    settings = {"level", "radius", "semantic_threshold", "num_clusters", "seed"}
    assert set(DuplicatesConfig(level="perceptual").described()) == settings, "finished datasets record the digest"
    assert set(DuplicatesConfig(level="all").described()) == settings | {"altered_agreement", "overlaid_agreement"}


NO_MODELS = ScoreConfig(clip_weights=None, aesthetic_weights=None, watermark_weights=None, safety_weights=None)


def recipe_of(level: str, store_miniatures: bool = True) -> Recipe:
    score = NO_MODELS.model_copy(update={"store_miniatures": store_miniatures})
    return Recipe(name="test", score=score, duplicates=DuplicatesConfig(level=level))


@pytest.fixture
def scored(tmp_path, images):
    """Two shards: three images, an equal one, and a mirrored, a cropped and a watermarked copy of each of them."""
    chosen = images[1:7:2]
    copies = [CHANGES[change](image) for change, image in zip(ALTERED, chosen, strict=True)]
    rows = [Fetched(encoded(image)) for image in [*chosen, chosen[0], *copies]]
    dataset = write_downloads(tmp_path, rows, per_shard=4)
    run_batch(SCORE, dataset, recipe_of("altered"), [0, 1])
    return dataset


def test_the_stage_counts_altered_copies_and_decide_gives_their_reason(scored):
    recipe = recipe_of("altered")
    (report,) = run_batch(DEDUP, scored, recipe, [0])
    assert report.dropped == {"exact": 1, "perceptual": 1, "altered": 2}
    assert report.notes == [
        "of 7 images, each level of duplicates would drop: exact 1, perceptual 2, altered 4; semantic not counted"
    ]
    run_batch(DECIDE, scored, recipe, [0])
    reasons = require_entry(scored, "decide", 0).dropped
    assert sum(reasons.values()) == 4
    assert reasons["duplicate_altered"] >= 2
    assert DECIDE.drops.last["duplicate_altered"] == "a mirrored, cropped or watermarked copy of a kept image"


def test_shards_without_miniatures_or_with_those_of_another_version_are_refused(scored):
    assert scored_images(scored).has_miniatures
    table = pq.read_table(scored.scores(1))
    other = {**table.schema.metadata, b"sdtrain.miniature": b"0"}
    for changed in (table.replace_schema_metadata(other), table.drop_columns(["miniature"])):
        pq.write_table(changed, scored.scores(1))
        with pytest.raises(UserError, match=r"level: altered compares miniatures.*score\.store_miniatures: true"):
            run_batch(DEDUP, scored, recipe_of("altered"), [0])
        run_batch(DEDUP, scored, recipe_of("perceptual"), [0])


def test_a_recipe_without_miniatures_is_refused_and_one_that_asks_for_them_scores_again(scored):
    embedded = NO_MODELS.model_copy(update={"store_embeddings": True, "clip_weights": "random:0"})
    with pytest.raises(ValueError, match=r"duplicates\.level: all compares miniatures\. Set score\.store_miniatures"):
        Recipe(name="test", score=embedded, duplicates=DuplicatesConfig(level="all"))
    assert pending(SCORE, scored, recipe_of("altered")) == []
    assert pending(SCORE, scored, recipe_of("perceptual", store_miniatures=False)) == [0, 1]
