"""Long, thin images: stored, or refused with a reason, and shown to every network in little memory."""

import tracemalloc
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

from filters.search.sheet import small
from sdtrain.dataset.config import DownloadConfig
from sdtrain.images import crops
from sdtrain.images.crops import resize_and_crop, resized_part
from sdtrain.images.decode import ImageError
from sdtrain.images.store import ImageMaker
from sdtrain.models.clip import Preprocess, clip_view
from tests.sdtrain.download.download_fixtures import encoded, photo
from tests.sdtrain.images.hostile_images import jpeg_of_size, png_of_size

LINES = {size: Image.new("RGB", size, "teal") for size in ((60_000, 1), (1, 60_000), (30_000, 2))}
LINES_BODIES = {size: encoded(image, "png") for size, image in LINES.items()}
MODES = {  # what becomes of 60000 x 1
    "no": (60_000, 1),
    "keep_ratio": (60_000, 1),
    "center_crop": (60_000, 1),
    "border": (512, 512),
    "keep_ratio_largest": (512, 1),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_line_of_pixels_is_stored_in_every_mode(mode):
    stored = ImageMaker(DownloadConfig(resize_mode=mode))(LINES_BODIES[60_000, 1])
    assert (stored.width, stored.height) == MODES[mode]
    turned = ImageMaker(DownloadConfig(resize_mode=mode))(LINES_BODIES[1, 60_000])
    assert (turned.height, turned.width) == MODES[mode]
    assert (turned.original_width, turned.original_height) == (1, 60_000)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["jpg", "png", "webp"])
def test_a_line_that_is_to_be_enlarged_or_too_long_for_its_format_has_a_reason(mode, form):
    config = DownloadConfig(resize_mode=mode, resize_only_if_bigger=False, encode_format=form, encode_quality=9)
    for size, body in LINES_BODIES.items():
        is_refused = mode in ("keep_ratio", "center_crop") or (mode == "no" and form == "webp")  # 16,383 px at most
        with pytest.raises(ImageError, match="resize_failed") if is_refused else nullcontext():
            stored = ImageMaker(config)(body)
            assert max(stored.width, stored.height) <= max(size)


def test_what_would_fill_the_memory_is_refused_before_it_is_resized(monkeypatch):
    monkeypatch.setattr("sdtrain.images.resize.ResizeEngine.__call__", lambda *_, **__: pytest.fail("resized"))
    for mode in ("keep_ratio", "center_crop"):
        with pytest.raises(ImageError, match="resize_failed: enlarged"):
            ImageMaker(DownloadConfig(resize_mode=mode, resize_only_if_bigger=False))(LINES_BODIES[60_000, 1])


@pytest.mark.parametrize("size", LINES)
def test_networks_see_a_line_in_little_memory(size):
    image = LINES[size]
    crop = resize_and_crop(image, (512, 512), None)
    assert crop.pixels.shape == (512, 512, 3)
    assert np.ptp(crop.pixels.reshape(-1, 3), axis=0).max() == 0
    assert np.diff(np.reshape(crop.box, (2, 2)), axis=0) == pytest.approx(min(size))  # a square of the source
    assert clip_view(image, Preprocess(224)).getcolors() == [(224 * 224, (0, 128, 128))]
    assert min(small(image).size) == 1


@pytest.mark.parametrize("place", [None, 0.0, 0.3, 0.999])
@pytest.mark.parametrize("size", [(640, 32), (33, 500)])
def test_a_part_alone_has_the_pixels_of_the_part_of_all(size, place, monkeypatch):
    image = photo(5, *size)
    whole = resize_and_crop(image, (64, 64), place)
    monkeypatch.setattr(crops, "_MOST_PIXELS", 0)
    part = resize_and_crop(image, (64, 64), place)
    assert part.box == whole.box
    difference = np.abs(part.pixels.astype(int) - whole.pixels)
    assert difference.max() <= 2
    assert difference.mean() < 0.05


def test_a_part_is_computed_without_the_rest():
    line = LINES[60_000, 1]
    tracemalloc.start()
    assert resized_part(line, (30_720_000, 512), (1000, 0, 1512, 512), Image.Resampling.BICUBIC).size == (512, 512)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_images_without_a_side_are_no_images():
    bmp, webp = encoded(photo(1), "bmp"), encoded(photo(1), "webp")
    frame = webp.index(b"\x9d\x01\x2a") + 3
    nothing = [png_of_size(0, 60_000), jpeg_of_size(60_000, 0), webp[:frame] + bytes(4) + webp[frame + 4 :]]
    for body in [*nothing, bmp[:18] + bytes(8) + bmp[26:], bmp[:22] + bytes(4) + bmp[26:]]:
        with pytest.raises(ImageError, match="not_an_image"):
            ImageMaker(DownloadConfig())(body)
