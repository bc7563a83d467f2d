import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy.ndimage import convolve

from filters.columns import QUALITY_COLUMNS
from filters.score.preprocess import gray_of, watermark_view
from filters.score.quality import measure

PHOTOS = Path(__file__).parents[4] / "shared" / "data" / "photos"
NOISE = np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)


def measures_of(image):
    return measure(gray_of(watermark_view(image)))


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
