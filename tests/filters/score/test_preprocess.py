import io
import math
from pathlib import Path

import imagehash
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.ndimage import convolve

from filters.columns import QUALITY_COLUMNS
from filters.score.preprocess import (
    WATERMARK_MEAN,
    WATERMARK_STD,
    RequiredViews,
    Sample,
    gray_of,
    measure,
    pixel_sha256,
    preprocess,
)
from sdtrain.images.decode import decode_rgb
from sdtrain.models.clip import Preprocess, clip_view, normalised, pixels_of
from tests.image_fixtures import encoded, scene_image

CLIP_ORACLE = Path(__file__).parents[4] / "shared" / "data" / "clip_preprocess"


def preprocessed(content, clip):
    return preprocess(Sample("key", "uid", {"png": content}), RequiredViews(clip, watermark=True))


def clip_input(content, clip):
    """(3, H, W) float32."""
    return normalised(preprocessed(content, clip).clip[None], clip.mean, clip.std)[0].numpy()


@pytest.mark.skipif(not CLIP_ORACLE.exists(), reason="the stored tensors are not beside this checkout")
@pytest.mark.parametrize("name", ["123_456", "208_495", "321_421", "389_535"])
def test_clips_input_is_bit_for_bit_that_of_clip_retrieval(name):
    content = (CLIP_ORACLE / f"{name}.jpg").read_bytes()
    stored = np.load(CLIP_ORACLE / f"{name}.clip_preprocess_224_f32.npy").reshape(3, 224, 224)
    assert np.array_equal(clip_input(content, Preprocess(224)), stored)


@pytest.mark.parametrize("size", [(96, 80), (80, 96), (333, 100), (100, 333), (64, 64), (65, 64)])
@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_clips_input_is_bit_for_bit_that_of_open_clips_own_preprocessing(size, squash, resample):
    image = scene_image(1, *size)
    clip = Preprocess(64, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7), resample, squash)
    mode = "squash" if squash else "shortest"
    reference = open_clip.image_transform(
        64, is_train=False, mean=clip.mean, std=clip.std, interpolation=resample, resize_mode=mode
    )
    found = clip_input(encoded(image, "png"), clip)
    assert np.array_equal(found, reference(image).numpy())
    alone = normalised(pixels_of(clip_view(image, clip))[None], clip.mean, clip.std)[0].numpy()
    assert np.array_equal(found, alone), "the view that search and evaluation make of a single image"


def test_the_watermark_input_squashes_the_whole_image():
    halves = Image.new("RGB", (200, 100), "black")
    halves.paste("white", (100, 0, 200, 100))
    view = preprocessed(encoded(halves, "png"), None).watermark
    pixels = normalised(view[None], WATERMARK_MEAN, WATERMARK_STD)[0].numpy()
    assert pixels.shape == (3, 256, 256)
    np.testing.assert_allclose(
        pixels[:, 5, 5], (0 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225], atol=1e-6
    )
    np.testing.assert_allclose(pixels[0, 250, 250], (1 - 0.485) / 0.229, atol=1e-6)


@pytest.mark.parametrize("size", [(733, 447), (447, 733), (30, 700), (90, 60)])
def test_views_hashes_and_thumbnails_are_those_of_pillow_and_imagehash(size):
    image = scene_image(8, *size)
    item = preprocessed(encoded(image, "png"), Preprocess(224))
    assert np.array_equal(item.watermark.numpy(), np.asarray(squashed(image)))
    assert np.array_equal(item.clip.numpy(), np.asarray(clip_view(image, Preprocess(224))))
    assert item.row["thumbnail"] == image.resize((4, 4), Image.Resampling.BOX).tobytes()
    assert f"{item.row['phash'] % 2**64:016x}" == str(imagehash.phash(image))
    assert {name: item.row[name] for name in QUALITY_COLUMNS} == measures_of(image)
    assert (item.row["image_width"], item.row["image_height"]) == size


def test_a_batch_is_normalised_like_its_images_one_by_one():
    pixels = torch.stack([pixels_of(scene_image(i, 64, 64)) for i in range(3)])
    whole = normalised(pixels, WATERMARK_MEAN, WATERMARK_STD)
    assert torch.equal(whole, torch.cat([normalised(one[None], WATERMARK_MEAN, WATERMARK_STD) for one in pixels]))


def test_the_pixel_digest_tells_images_and_their_sizes_apart_and_not_how_they_are_encoded():
    image = scene_image(4)
    as_png, as_webp = (decode_rgb(encoded(image, form, lossless=True)) for form in ("png", "webp"))
    assert pixel_sha256(as_png) == pixel_sha256(as_webp) == pixel_sha256(image)
    turned = Image.frombytes("RGB", (image.height, image.width), image.tobytes())
    assert pixel_sha256(turned) != pixel_sha256(image)


PHOTOS = Path(__file__).parents[4] / "shared" / "data" / "photos"
NOISE = np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)


def squashed(image):
    return image.convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)


def measures_of(image):
    return measure(gray_of(squashed(image)))


def framed(top=0, bottom=0, left=0, right=0, level=255):
    gray = NOISE.copy()
    gray[:top], gray[:, :left] = level, level
    gray[256 - bottom :], gray[:, 256 - right :] = level, level
    return gray


def test_the_formulas_are_those_of_numpy_and_scipy():
    found = measure(NOISE)
    kernel = [[0, 1, 0], [1, -4, 1], [0, 1, 0]]
    shares = np.bincount(NOISE.ravel(), minlength=256) / NOISE.size
    assert found["sharpness"] == pytest.approx(convolve(NOISE.astype(float), kernel, mode="mirror").var(), rel=1e-6)
    assert found["entropy"] == pytest.approx(-(shares * np.log2(shares)).sum(), abs=1e-5)
    assert found["contrast"] == pytest.approx(NOISE.std() / 255, abs=1e-6)


def test_one_colour_is_all_border_and_nothing_else():
    assert measure(np.full((256, 256), 77, np.uint8)) == {"sharpness": 0, "entropy": 0, "border": 1, "contrast": 0}


@pytest.mark.parametrize("levels", [2, 4, 256])
def test_equally_frequent_levels_have_the_entropy_of_their_number(levels):
    gray = np.resize(np.arange(levels, dtype=np.uint8), (256, 256))
    assert measure(gray)["entropy"] == pytest.approx(math.log2(levels), abs=1e-5)


@pytest.mark.parametrize(
    ("edges", "share"),
    [
        ({}, 0.0),
        ({"top": 32, "bottom": 32}, 0.25),
        ({"left": 64}, 0.25),
        ({"top": 64, "bottom": 64, "left": 64, "right": 64}, 0.75),
    ],
)
@pytest.mark.parametrize("level", [0, 128, 255])
def test_the_border_is_the_area_that_one_colour_takes_at_the_edges(edges, share, level):
    assert measure(framed(**edges, level=level))["border"] == pytest.approx(share, abs=0.002)


def test_a_smooth_sky_is_no_border():
    gray = np.repeat(np.linspace(0, 255, 256).astype(np.uint8)[:, None], 256, axis=1)
    assert measure(gray)["border"] < 0.1


@pytest.mark.skipif(not PHOTOS.exists(), reason="the photographs are not beside this checkout")
def test_real_photographs_are_sharper_than_their_blurred_or_enlarged_copies_and_a_jpeg_border_is_seen():
    for path in sorted(PHOTOS.glob("kodak_*.png")):
        photo = Image.open(path).convert("RGB")
        found = measures_of(photo)
        blurred = photo.filter(ImageFilter.GaussianBlur(4))
        enlarged = photo.resize((photo.width // 8, photo.height // 8)).resize(photo.size)
        assert measures_of(blurred)["sharpness"] < found["sharpness"] / 4
        assert measures_of(enlarged)["sharpness"] < found["sharpness"] / 4
        assert found["entropy"] > 5
        assert found["contrast"] > 0.05
        assert found["border"] < 0.1
        buffer = io.BytesIO()
        wide = Image.new("RGB", (photo.width, photo.height * 2), "black")
        wide.paste(photo, (0, photo.height // 2))
        wide.save(buffer, "jpeg", quality=75)
        assert measures_of(Image.open(buffer))["border"] == pytest.approx(0.5, abs=0.03)


def test_every_measure_has_a_column():
    assert tuple(measure(NOISE)) == QUALITY_COLUMNS
