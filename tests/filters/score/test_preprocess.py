from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from filters.score.preprocess import WATERMARK_MEAN, WATERMARK_STD, pixel_sha256, watermark_view
from sdtrain.images.decode import decode_rgb
from sdtrain.models.clip import Preprocess, clip_view, normalised, pixels_of
from tests.image_fixtures import encoded, scene_image

CLIP_ORACLE = Path(__file__).parents[4] / "shared" / "data" / "clip_preprocess"


def clip_input(image, preprocess):
    """(3, H, W) float32."""
    return normalised(pixels_of(clip_view(image, preprocess))[None], preprocess.mean, preprocess.std)[0].numpy()


@pytest.mark.skipif(not CLIP_ORACLE.exists(), reason="the stored tensors are not beside this checkout")
@pytest.mark.parametrize("name", ["123_456", "208_495", "321_421", "389_535"])
def test_clips_input_is_bit_for_bit_that_of_clip_retrieval(name):
    image = decode_rgb((CLIP_ORACLE / f"{name}.jpg").read_bytes())
    stored = np.load(CLIP_ORACLE / f"{name}.clip_preprocess_224_f32.npy").reshape(3, 224, 224)
    assert np.array_equal(clip_input(image, Preprocess(224)), stored)


@pytest.mark.parametrize("size", [(96, 80), (80, 96), (333, 100), (64, 64), (65, 64)])
@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_clips_input_is_bit_for_bit_that_of_open_clips_own_preprocessing(size, squash, resample):
    image = scene_image(1, *size)
    preprocess = Preprocess(64, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7), resample, squash)
    mode = "squash" if squash else "shortest"
    reference = open_clip.image_transform(
        64, is_train=False, mean=preprocess.mean, std=preprocess.std, interpolation=resample, resize_mode=mode
    )
    assert np.array_equal(clip_input(image, preprocess), reference(image).numpy())


def test_the_watermark_input_squashes_the_whole_image():
    halves = Image.new("RGB", (200, 100), "black")
    halves.paste("white", (100, 0, 200, 100))
    pixels = normalised(pixels_of(watermark_view(halves))[None], WATERMARK_MEAN, WATERMARK_STD)[0].numpy()
    assert pixels.shape == (3, 256, 256)
    np.testing.assert_allclose(
        pixels[:, 5, 5], (0 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225], atol=1e-6
    )
    np.testing.assert_allclose(pixels[0, 250, 250], (1 - 0.485) / 0.229, atol=1e-6)


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
