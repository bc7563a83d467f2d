import io
import sys

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from sdtrain.images import decode
from sdtrain.images.decode import ImageError, decode_rgb, image_extension
from sdtrain.images.header import read_header
from sdtrain.images.jxl_size import jxl_size
from tests.image_fixtures import encoded, scene_image

FORMS = ("jpeg", "png", "webp", "gif", "tiff", "bmp", "avif")
ORIENTATION = 274


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on damaged metadata
@pytest.mark.parametrize("form", FORMS)
def test_damaged_bytes_are_an_image_or_an_oserror_and_nothing_else(form):
    rng = np.random.default_rng(sum(form.encode()))
    whole = encoded(scene_image(1, 40, 32), form)
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
    content = encoded(scene_image(1), "png")
    for error in (TypeError, KeyError, ZeroDivisionError, EOFError, NotImplementedError, Image.DecompressionBombError):

        def fail(image, error=error):
            raise error("damaged")

        monkeypatch.setattr(Image.Image, "load", fail)
        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
        with pytest.raises(OSError, match=r"^(not_an_image|truncated|too_many_pixels): "):
            decode_rgb(content)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0)).convert(mode)
    assert decode_rgb(encoded(clear, "png")).getcolors() == [(16, (255, 255, 255))]


def test_a_transparent_palette_colour_is_laid_on_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 0)
    for form in ("png", "gif"):
        decoded = decode_rgb(encoded(image, form, transparency=0))
        assert [decoded.getpixel(place) for place in ((0, 0), (1, 1))] == [(255, 255, 255), (40, 50, 60)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["jpeg", "png", "webp", "tiff", "avif"])
def test_exif_orientation_is_applied(form, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = encoded(scene_image(3, 40, 24), form, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    decoded = decode_rgb(content)
    assert decoded.size == ((40, 24) if orientation < 5 else (24, 40))
    assert decoded.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"]
)
def test_a_corrupt_exif_block_counts_as_none(exif):
    image = scene_image(3, 40, 24)
    assert decode_rgb(encoded(image, exif=exif)).tobytes() == decode_rgb(encoded(image)).tobytes()


@pytest.mark.parametrize("nonsense", [0, 9, 77])
def test_an_orientation_out_of_range_counts_as_none(nonsense):
    exif = Image.Exif()
    exif[ORIENTATION] = nonsense
    assert decode_rgb(encoded(scene_image(3, 40, 24), exif=exif)).size == (40, 24)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bit_gray_keeps_its_upper_bits(dtype):
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    content = encoded(Image.fromarray(values.astype(dtype)), "tiff" if dtype == ">u2" else "png")
    assert np.array_equal(np.asarray(decode_rgb(content)), np.repeat((values >> 8)[..., None], 3, axis=2))


def test_16_bit_rgb_and_rgba_keep_their_upper_bits():
    values = np.random.default_rng(1).integers(0, 65536, (8, 8, 4), np.uint16)
    rgb = cv2.imencode(".png", values[..., :3])[1].tobytes()
    assert np.array_equal(np.asarray(decode_rgb(rgb)), (values[..., 2::-1] >> 8))
    values[..., 3] = 65535
    rgba = cv2.imencode(".png", values)[1].tobytes()
    assert np.array_equal(np.asarray(decode_rgb(rgba)), (values[..., 2::-1] >> 8))


def test_cmyk_has_the_colours_that_opencv_sees():
    image = scene_image(5).convert("CMYK")
    content = encoded(image)  # Pillow writes them inverted, with Adobe's marker
    expected = cv2.cvtColor(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    assert np.abs(np.asarray(decode_rgb(content), int) - expected).max() <= 2
    assert np.abs(np.asarray(decode_rgb(content), int) - np.asarray(scene_image(5), int)).mean() < 6


@pytest.mark.parametrize("form", ["gif", "webp", "png", "tiff", "avif"])
def test_the_first_of_several_frames_is_taken(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = encoded(
        frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "webp" else {})
    )
    assert np.abs(np.asarray(decode_rgb(content), int) - (255, 0, 0)).max() <= (form == "avif")


@pytest.mark.parametrize("mode", ["1", "L", "P"])
@pytest.mark.parametrize("form", ["png", "bmp", "tiff"])
def test_gray_and_palette_images_become_rgb(mode, form):
    image = scene_image(2, 16, 16).convert(mode)
    assert decode_rgb(encoded(image, form)).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_pixels_of_unknown_range_are_refused(mode):
    with pytest.raises(ImageError) as refused:
        decode_rgb(encoded(Image.new(mode, (4, 4)), "tiff"))
    assert refused.value.reason == "other_format"


JXL_PLUGIN = """
from PIL import Image, ImageFile
class JXLImageFile(ImageFile.ImageFile):
    format = "JXL"
    def _open(self):
        self.fp.seek(2)
        self._size, self._mode = (4, 4), "RGB"
        self.tile = [ImageFile._Tile("raw", (0, 0, 4, 4), 2, "RGB")]
Image.register_open("JXL", JXLImageFile, lambda prefix: prefix.startswith(b"\\xff\\x0a"))
"""


def jxl_head(*fields):
    """A codestream of numbers, each with its bits, from the lowest up."""
    value = place = 0
    for number, bits in fields:
        value, place = value | number << place, place + bits
    return b"\xff\x0a" + value.to_bytes(16, "little")


JXL_SIZES = {  # by the specification's SizeHeader
    (256, 256): jxl_head((1, 1), (31, 5), (1, 3)),
    (40, 16): jxl_head((1, 1), (1, 5), (0, 3), (4, 5)),
    (160, 90): jxl_head((0, 1), (0, 2), (89, 9), (5, 3)),
    (7000, 513): jxl_head((0, 1), (1, 2), (512, 13), (0, 3), (1, 2), (6999, 13)),
    (2**30, 2**30): jxl_head((0, 1), (3, 2), (2**30 - 1, 30), (1, 3)),
}


@pytest.mark.parametrize("size", JXL_SIZES)
def test_the_size_of_a_jpeg_xl_is_read_without_its_decoder(size):
    bare = JXL_SIZES[size]
    start = b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl \0\0\0\0jxl "
    for content in (bare, start + b"\0\0\0\0jxlc" + bare, start + b"\0\0\0\0jxlp\0\0\0\0" + bare):
        assert jxl_size(content) == size
    assert jxl_size(start + bare) is jxl_size(bare[:9]) is None


def test_jpeg_xl_is_read_where_pillows_plugin_is_installed(tmp_path, monkeypatch):
    content = b"\xff\x0a" + bytes(range(48))
    with pytest.raises(ImageError, match="other_format: JPEG XL"):
        read_header(content, 2**20)
    (tmp_path / "pillow_jxl.py").write_text(JXL_PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    decode._jxl.cache_clear()
    try:
        assert read_header(content, 2**20).extension == "jxl"
        assert decode_rgb(content).tobytes() == bytes(range(48))
        monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("opened, and so decoded"))
        with pytest.raises(ImageError, match="too_many_pixels: 1073741824 x 1073741824"):
            read_header(JXL_SIZES[2**30, 2**30], 2**20)
        with pytest.raises(ImageError, match="not_an_image"):
            decode_rgb(b"\0\0\0\x0cJXL broken")
    finally:
        decode._jxl.cache_clear()
        Image.OPEN.pop("JXL", None)
        Image.ID.remove("JXL")
        sys.modules.pop("pillow_jxl", None)


@pytest.mark.parametrize("form", ["ico", "dds", "tga", "pcx", "ppm", "eps", "pdf", "jpeg2000"])
def test_other_formats_are_not_read(form):
    with pytest.raises(ImageError):
        decode_rgb(encoded(scene_image(1), form))


def test_the_image_is_found_among_the_members():
    assert image_extension({"json": b"", "png": b"", "txt": b""}) == "png"
    with pytest.raises(KeyError):
        image_extension({"json": b"", "txt": b""})
