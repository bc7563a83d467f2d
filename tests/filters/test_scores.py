import io
from pathlib import Path

import imagehash
import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from picture_fixtures import Fetched, encoded, scene_picture, write_downloads
from PIL import Image

from filters.heads import load_aesthetic, load_clip, load_safety, load_watermark
from filters.inputs import clip_pixels, perceptual_hash, pixel_sha256, watermark_pixels
from filters.recipe import Recipe, ScoreConfig
from filters.scores import SCORE, Looked, Models, score_batch
from sdtrain.data.manifest import require_entry
from sdtrain.data.pictures import decode_rgb
from sdtrain.data.stage import pending, run_batch

CLIP_ORACLE = Path(__file__).parents[2].parent / "shared" / "data" / "clip_preprocess"
RANDOM = ScoreConfig(
    clip_model="ViT-demo",
    clip_weights="random:0",
    aesthetic_weights="random:1",
    watermark_weights="random:2",
    safety_weights="random:3",
    batch_size=4,
)
NO_MODELS = ScoreConfig(clip_weights=None, aesthetic_weights=None, watermark_weights=None, safety_weights=None)
DAMAGED = encoded(scene_picture(99))[:700]


# Of pixels drawn by Pillow: changes only if the hash or the drawing does.
HASH_OF_SCENE_3 = -1831951039154706893


def recipe_of(score: ScoreConfig) -> Recipe:
    return Recipe(name="test", score=score)


def make_rows() -> list[Fetched]:
    pictures = [Fetched(encoded(scene_picture(i)), caption=f"caption {i}") for i in range(9)]
    return [*pictures, Fetched(None, reason="http_404"), Fetched(DAMAGED), Fetched(encoded(scene_picture(11)), None)]


def score(dataset, config: ScoreConfig) -> list[dict]:
    recipe = recipe_of(config)
    run_batch(SCORE, dataset, recipe, pending(SCORE, dataset, recipe))
    return [row for shard in SCORE.shards(dataset, recipe) for row in pq.read_table(dataset.scores(shard)).to_pylist()]


@pytest.mark.skipif(not CLIP_ORACLE.exists(), reason="the stored tensors are not beside this checkout")
@pytest.mark.parametrize("name", ["123_456", "208_495", "321_421", "389_535"])
def test_clips_input_is_bit_for_bit_that_of_clip_retrieval(name):
    picture = decode_rgb((CLIP_ORACLE / f"{name}.jpg").read_bytes())
    stored = np.load(CLIP_ORACLE / f"{name}.clip_preprocess_224_f32.npy").reshape(3, 224, 224)
    assert np.array_equal(clip_pixels(picture, 224), stored)


@pytest.mark.parametrize("size", [(96, 80), (80, 96), (333, 100), (64, 64), (65, 64)])
def test_clips_input_equals_open_clips_own_preprocessing(size):
    picture = scene_picture(1, *size)
    reference = open_clip.image_transform(64, is_train=False)(picture)
    np.testing.assert_allclose(clip_pixels(picture, 64), reference.numpy(), atol=1e-6)


def test_the_watermark_input_squashes_the_whole_picture():
    halves = Image.new("RGB", (200, 100), "black")
    halves.paste("white", (100, 0, 200, 100))
    pixels = watermark_pixels(halves)
    assert pixels.shape == (3, 256, 256)
    np.testing.assert_allclose(
        pixels[:, 5, 5], (0 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225], atol=1e-6
    )
    np.testing.assert_allclose(pixels[0, 250, 250], (1 - 0.485) / 0.229, atol=1e-6)


def test_the_perceptual_hash_is_a_known_number_and_close_for_copies():
    picture = scene_picture(3, 600, 520)
    assert perceptual_hash(picture) == HASH_OF_SCENE_3
    copy = decode_rgb(encoded(picture.resize((540, 468)), quality=75))
    assert (perceptual_hash(copy) ^ perceptual_hash(picture)).bit_count() <= 4


def test_the_perceptual_hash_is_that_of_imagehash():
    for seed in range(20):
        picture = scene_picture(seed)
        assert f"{perceptual_hash(picture) % 2**64:016x}" == str(imagehash.phash(picture))


def test_the_pixel_digest_tells_pictures_and_their_sizes_apart_and_not_how_they_are_encoded():
    picture = scene_picture(4)
    as_png, as_webp = (decode_rgb(encoded(picture, form, lossless=True)) for form in ("png", "webp"))
    assert pixel_sha256(as_png) == pixel_sha256(as_webp) == pixel_sha256(picture)
    turned = Image.frombytes("RGB", (picture.height, picture.width), picture.tobytes())
    assert pixel_sha256(turned) != pixel_sha256(picture)


def test_every_downloaded_picture_gets_a_row_and_a_damaged_one_its_reason(tmp_path):
    dataset = write_downloads(tmp_path, make_rows())
    rows = score(dataset, RANDOM)
    assert len(rows) == 11
    assert [row["reason"] for row in rows] == [None] * 9 + ["undecodable", None]
    damaged = rows[9]
    assert all(damaged[name] is None for name in damaged if name not in ("uid", "key", "reason"))
    for row in rows[:9]:
        assert (row["image_width"], row["image_height"]) == (96, 80)
        assert 0 < row["pwatermark"] < 1
        assert 0 < row["punsafe"] < 1
        assert -1 <= row["similarity"] <= 1
        assert row["aesthetic"] is not None
    reports = [require_entry(dataset, "score", shard) for shard in (0, 1)]
    assert [(r.num_in, r.num_out, r.dropped) for r in reports] == [(9, 9, {}), (2, 1, {"undecodable": 1})]


def test_scores_are_what_the_networks_say_of_the_picture_and_its_caption(tmp_path):
    dataset = write_downloads(tmp_path, [Fetched(encoded(scene_picture(5)), caption="a blue ring")])
    (row,) = score(dataset, RANDOM)
    picture = decode_rgb(encoded(scene_picture(5)))
    clip, tokenizer = load_clip("ViT-demo", "random:0")
    with torch.inference_mode():
        image = clip.encode_image(torch.from_numpy(clip_pixels(picture, 64))[None])
        text = clip.encode_text(tokenizer(["a blue ring"]))
        assert row["similarity"] == pytest.approx(torch.cosine_similarity(image, text).item(), abs=1e-5)
        assert row["aesthetic"] == pytest.approx(load_aesthetic("random:1")(image).item(), abs=1e-4)
        assert row["punsafe"] == pytest.approx(load_safety("random:3")(image).item(), abs=1e-5)
        pixels = torch.from_numpy(watermark_pixels(picture))[None]
        assert row["pwatermark"] == pytest.approx(load_watermark("random:2")(pixels).item(), abs=1e-5)


def test_scores_do_not_depend_on_the_size_of_the_batch(tmp_path):
    one, seven = (
        score(write_downloads(tmp_path / str(size), make_rows()), RANDOM.model_copy(update={"batch_size": size}))
        for size in (1, 7)
    )
    for name in ("aesthetic", "pwatermark", "punsafe", "similarity"):
        assert [row[name] for row in one] == pytest.approx([row[name] for row in seven], abs=1e-5)
    assert [row["pixel_sha256"] for row in one] == [row["pixel_sha256"] for row in seven]


def test_a_score_that_is_no_number_is_null_so_that_no_rule_takes_it_for_high():
    looked = [Looked({"reason": None}, "a caption", watermark=watermark_pixels(scene_picture(i))) for i in range(3)]
    given = torch.tensor([float("nan"), 0.5, float("inf")])
    models = Models(torch.device("cpu"), None, None, None, None, watermark=lambda pixels: given)
    assert [row["pwatermark"] for row in score_batch(looked, models)] == [None, 0.5, None]


def test_skipped_models_leave_null_and_hashes_are_there_all_the_same(tmp_path):
    dataset = write_downloads(tmp_path, make_rows())
    rows = score(dataset, NO_MODELS)
    assert all(row[name] is None for row in rows for name in ("aesthetic", "pwatermark", "punsafe", "similarity"))
    assert all(row["pixel_sha256"] and row["phash"] is not None for row in rows if row["reason"] is None)


def test_without_clip_the_heads_that_need_its_embedding_are_not_asked_for(tmp_path):
    dataset = write_downloads(tmp_path, make_rows()[:2])
    config = ScoreConfig(clip_weights=None, watermark_weights="random:0", aesthetic_weights="/nowhere/head.pth")
    assert all(row["aesthetic"] is None and row["pwatermark"] is not None for row in score(dataset, config))


def test_a_second_run_does_nothing_and_a_rerun_gives_the_same_bytes(tmp_path, digests):
    dataset = write_downloads(tmp_path, make_rows())
    score(dataset, RANDOM)
    assert pending(SCORE, dataset, recipe_of(RANDOM)) == []
    before = digests(dataset)
    run_batch(SCORE, dataset, recipe_of(RANDOM), [1, 0])
    assert digests(dataset) == before


def test_other_weights_make_the_scores_pending_again(tmp_path):
    dataset = write_downloads(tmp_path, make_rows())
    score(dataset, NO_MODELS)
    for other in ({"watermark_weights": "random:7"}, {"clip_weights": "random:7", "clip_model": "ViT-demo"}):
        assert pending(SCORE, dataset, recipe_of(NO_MODELS.model_copy(update=other))) == [0, 1]


def test_the_table_says_which_weights_gave_its_scores(tmp_path):
    dataset = write_downloads(tmp_path, make_rows()[:2])
    score(dataset, RANDOM)
    described = pq.read_schema(dataset.scores(0)).metadata
    assert described[b"sdtrain.clip_model"] == b"ViT-demo"
    assert described[b"sdtrain.watermark_digest"] == b"random:2"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "I;16", "CMYK", "1"])
def test_pictures_of_every_mode_are_scored(tmp_path, mode):
    source = scene_picture(6).convert("L").convert("I;16") if mode == "I;16" else scene_picture(6).convert(mode)
    content = encoded(source, "tiff" if mode in ("I;16", "CMYK") else "png")
    assert Image.open(io.BytesIO(content)).mode == mode
    dataset = write_downloads(tmp_path, [Fetched(content)])
    (row,) = score(dataset, NO_MODELS)
    assert row["reason"] is None
