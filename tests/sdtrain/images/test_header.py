import contextlib
import tracemalloc

import numpy as np
import pytest

from sdtrain.images.decode import ImageError, upright_rgb
from sdtrain.images.header import read_header
from tests.sdtrain.download.download_fixtures import encoded, photo
from tests.sdtrain.images.hostile_images import GOOD, HOSTILE, PHOTO, PNG, WEBP, exif_turned

MAX_PIXELS = 2**27
PLAIN = {"jpeg", "png", "webp", "progressive", "one_pixel", "junk_behind_jpeg", "junk_behind_png", "thumbnail"}
PLAIN |= {"corrupt_exif"}
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp", "avif": "avif", "avif_animation": "avif"}
EXTENSIONS |= dict.fromkeys(("gif", "bmp", "tiff"))


@pytest.mark.parametrize("name", GOOD)
def test_good_images_pass_and_only_upright_8_bit_rgb_is_plain(name):
    assert read_header(GOOD[name], MAX_PIXELS).is_plain == (name in PLAIN)


@pytest.mark.parametrize("name", EXTENSIONS)
def test_the_extension_is_that_of_the_content(name):
    assert read_header(GOOD[name], MAX_PIXELS).extension == EXTENSIONS[name]


@pytest.mark.parametrize("name", [n for n, (_, reason) in HOSTILE.items() if reason == "too_many_pixels"])
def test_bombs_are_refused_without_decoding(name):
    tracemalloc.start()
    with pytest.raises(ImageError) as refused:
        read_header(HOSTILE[name][0], MAX_PIXELS)
    assert refused.value.reason == "too_many_pixels"
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_the_limit_of_pixels_is_exact():
    assert read_header(PHOTO, 200 * 150)
    with pytest.raises(ImageError, match="too_many_pixels: 200 x 150"):
        read_header(PHOTO, 200 * 150 - 1)


@pytest.mark.parametrize("content", [PHOTO, PNG, WEBP, GOOD["progressive"], GOOD["gif"], GOOD["gif_animation"]])
def test_a_file_cut_anywhere_is_never_an_image(content):
    for end in np.random.default_rng(3).integers(1, len(content) - 40, 60):  # the last bytes: test_completeness.py
        with pytest.raises(ImageError) as refused:
            upright_rgb(read_header(content[:end], MAX_PIXELS).image)
        assert refused.value.reason in ("truncated", "not_an_image")


def test_random_damage_of_the_head_is_an_image_error_and_no_other():
    rng = np.random.default_rng(5)
    for content in (GOOD["jpeg"], GOOD["png"], GOOD["webp"], GOOD["gif_animation"], GOOD["tiff"], GOOD["thumbnail"]):
        for _ in range(150):
            damaged = np.frombuffer(content, np.uint8).copy()
            damaged[rng.integers(0, min(len(content), 400), 3)] = rng.integers(0, 256, 3)
            with contextlib.suppress(ImageError):
                read_header(damaged.tobytes(), MAX_PIXELS)


def test_an_orientation_behind_the_pixels_of_a_png_is_seen():
    turned = exif_turned(6, "png")
    begin = turned.index(b"eXIf") - 4
    end = begin + 12 + int.from_bytes(turned[begin : begin + 4], "big")
    moved = turned[:begin] + turned[end:-12] + turned[begin:end] + turned[-12:]
    assert not read_header(moved, MAX_PIXELS).is_plain


def test_an_image_of_several_jpegs_is_a_jpeg():
    several = encoded(photo(1), "mpo", save_all=True, append_images=[photo(2)])
    header = read_header(several, MAX_PIXELS)
    assert (header.extension, header.is_plain) == ("jpg", True)
