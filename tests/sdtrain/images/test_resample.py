import numpy as np
import pytest
from PIL import Image
from PIL.Image import Resampling

from sdtrain.images import resample as module
from sdtrain.images.resample import View, resample

FILTERS = (Resampling.BOX, Resampling.BILINEAR, Resampling.BICUBIC, Resampling.LANCZOS)


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Black and white dots, which drive every filter over both ends of the range."""
    return np.random.default_rng(seed).choice(np.array([0, 1, 254, 255], np.uint8), (height, width, 3))


def by_pillow(pixels: np.ndarray, view: View) -> np.ndarray:
    resized = Image.fromarray(pixels).resize(view.size_px, view.filter)
    return np.asarray(resized if view.box is None else resized.crop(view.box))


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("size_px", [(96, 80), (733, 447), (32, 32), (33, 1), (1, 33), (31, 500), (1024, 7)])
def test_every_filter_gives_pillows_bits_at_every_size(kind, size_px):
    pixels = noise(*size_px)
    views = [View(target, kind) for target in ((32, 32), (4, 4), (100, 61), (1, 1), size_px)]
    for view, found in zip(views, resample(pixels, views), strict=True):
        assert np.array_equal(found, by_pillow(pixels, view)), view


@pytest.mark.parametrize("kind", FILTERS)
def test_the_weights_are_pillows_for_some_hundred_widths(kind):
    for width in range(1, 400, 3):
        pixels = noise(width, 2, width)
        (found,) = resample(pixels, [View((37, 2), kind)])
        assert np.array_equal(found, by_pillow(pixels, View((37, 2), kind))), width


def test_a_part_of_a_view_is_cropped_from_the_whole():
    pixels = noise(200, 120)
    views = [View((107, 64), Resampling.BICUBIC, box) for box in ((21, 0, 85, 64), (0, 5, 107, 6), (106, 63, 107, 64))]
    for view, found in zip(views, resample(pixels, views), strict=True):
        assert np.array_equal(found, by_pillow(pixels, view)), view


def test_a_large_image_is_filtered_some_rows_at_a_time(monkeypatch):
    pixels, view = noise(200, 120), View((64, 50), Resampling.LANCZOS)
    monkeypatch.setattr(module, "_VALUES_AT_ONCE", 7 * 200 * 3)
    assert np.array_equal(resample(pixels, [view])[0], by_pillow(pixels, view))


def test_gray_images_have_one_channel():
    gray = noise(90, 70)[..., :1]
    (found,) = resample(gray, [View((32, 32), Resampling.LANCZOS)])
    wanted = Image.fromarray(gray[..., 0]).resize((32, 32), Resampling.LANCZOS)
    assert np.array_equal(found[..., 0], np.asarray(wanted))


def test_a_pillow_before_13_filters_the_width_of_a_tall_image_first_too(monkeypatch):
    pixels, view = noise(60, 300), View((50, 20), Resampling.BICUBIC)
    narrow = Image.fromarray(pixels).resize((50, 300), Resampling.BICUBIC)
    monkeypatch.setattr(module, "_TALL_IMAGES_BY_HEIGHT", False)
    assert np.array_equal(resample(pixels, [view])[0], np.asarray(narrow.resize((50, 20), Resampling.BICUBIC)))
    monkeypatch.setattr(module, "_TALL_IMAGES_BY_HEIGHT", True)
    short = Image.fromarray(pixels).resize((60, 20), Resampling.BICUBIC)
    assert np.array_equal(resample(pixels, [view])[0], np.asarray(short.resize((50, 20), Resampling.BICUBIC)))
