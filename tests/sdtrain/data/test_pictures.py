import numpy as np
import pytest
from picture_fixtures import encoded, scene_picture
from PIL import Image

from sdtrain.data.pictures import decode_rgb, picture_extension

FORMS = ("jpeg", "png", "webp", "gif", "tiff", "bmp", "ico", "dds", "tga")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on damaged metadata
@pytest.mark.parametrize("form", FORMS)
def test_damaged_bytes_are_a_picture_or_an_oserror_and_nothing_else(form):
    rng = np.random.default_rng(sum(form.encode()))
    whole = encoded(scene_picture(1, 40, 32), form)
    refused = 0
    for _ in range(400):
        damaged = np.frombuffer(whole, np.uint8).copy()
        places = rng.integers(0, min(len(whole), 150), rng.integers(1, 5))
        damaged[places] = rng.choice([0, 255, rng.integers(256)], len(places))
        try:
            assert decode_rgb(damaged[: rng.integers(1, len(whole) + 1)].tobytes()).mode == "RGB"
        except OSError:
            refused += 1
    assert refused > 0


def test_damaged_headers_of_any_kind_are_an_oserror(monkeypatch):
    content = encoded(scene_picture(1), "png")
    for error in (TypeError, KeyError, ZeroDivisionError, EOFError, NotImplementedError, Image.DecompressionBombError):

        def fail(picture, error=error):
            raise error("damaged")

        monkeypatch.setattr(Image.Image, "load", fail)
        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
        with pytest.raises(OSError, match="damaged"):
            decode_rgb(content)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0)).convert(mode)
    assert decode_rgb(encoded(clear, "png")).getcolors() == [(16, (255, 255, 255))]


def test_the_picture_is_found_among_the_members():
    assert picture_extension({"json": b"", "png": b"", "txt": b""}) == "png"
    with pytest.raises(KeyError):
        picture_extension({"json": b"", "txt": b""})
