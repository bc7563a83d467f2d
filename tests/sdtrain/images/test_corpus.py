"""Images that other projects ship for their tests and examples: none is lost, and no damage to one is a crash."""

import contextlib
import io
import sysconfig
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdtrain.dataset.config import DownloadConfig
from sdtrain.images.decode import ImageError
from sdtrain.images.store import ImageMaker
from tests.sdtrain.images.hostile_images import GOOD

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
MOST_BYTES, MOST_FILES = 300_000, 60
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on damaged metadata


def shipped_images() -> list[Path]:
    """Those of the installed packages, which are as many as 100,000 files."""
    files = Path(sysconfig.get_paths()["purelib"]).rglob("*")
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    return sorted(path for path in images if 0 < path.stat().st_size < MOST_BYTES)


def sample(files):
    """The same few files, of every folder."""
    return [files[i] for i in np.linspace(0, len(files) - 1, min(len(files), MOST_FILES)).astype(int)]


def pillow_reads(content):
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content)) as image:
        image.load()
        return image.mode not in ("I", "F", "LAB")  # refused: their range is unknown
    return False


def test_no_image_that_pillow_reads_is_lost():
    if not (shipped := shipped_images()):
        pytest.skip("no installed package ships images")
    make, lost = ImageMaker(DownloadConfig(image_size=64)), []
    for path in sample(shipped):
        content = path.read_bytes()
        try:
            make(content)
        except ImageError as error:
            lost += [(path.name, str(error))] if pillow_reads(content) else []
    assert lost == []


@pytest.mark.parametrize("name", GOOD)
def test_damage_anywhere_is_an_image_or_an_error_with_a_reason(name, caplog):
    make, rng = ImageMaker(DownloadConfig(image_size=64, max_pixels=2**20)), np.random.default_rng(len(GOOD[name]))
    for _ in range(15):
        damaged = np.frombuffer(GOOD[name], np.uint8).copy()
        places = rng.integers(0, len(damaged), rng.integers(0, 4))
        damaged[places] ^= rng.integers(1, 256, len(places), np.uint8)
        begin = rng.integers(0, 2) * rng.integers(0, len(damaged))  # a hole in half of them
        body = damaged[:begin].tobytes() + damaged[begin + rng.integers(0, 9) :].tobytes()
        body = body[: len(body) - rng.integers(0, 2) * rng.integers(0, 40)] + bytes(rng.integers(0, 3))
        with warnings.catch_warnings(), contextlib.suppress(ImageError):
            warnings.simplefilter("ignore")
            stored = make(body)
            assert stored.width * stored.height > 0
    assert "Unexpected failure" not in caplog.text
