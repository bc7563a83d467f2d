"""Decodes images to upright, opaque 8-bit RGB, here and in `download`.

| image | becomes |
|---|---|
| EXIF orientation 2 to 8 | turned or mirrored upright; a damaged EXIF block counts as none |
| grayscale, 1 bit to 8 bits | the gray value for red, green and blue |
| palette | its colours |
| CMYK, YCCK | RGB, with ink values inverted as Adobe's programs store them (and browsers read them) |
| 16 bits a channel | the upper 8 bits |
| alpha channel or transparent colour | laid on white |
| animated, or of several pages | its first frame |
| ICC profile | not applied: the numbers are taken as they are, as img2dataset and the models' own pipelines do |
| 32-bit integers or floats, CIELAB | refused: their range is unknown |
| without its end marker, or with metadata that Pillow refuses | the same, if no pixel is missing (`completeness`) |

JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF are read, and JPEG XL where the package `pillow-jxl-plugin` is installed.
"""

from __future__ import annotations

import importlib
import io
import struct
import sys
from collections.abc import Iterable
from functools import cache

import numpy as np
from PIL import (  # by name, or Pillow would look for and import every reader it has
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from sdtrain.images.completeness import is_whole, readable
from sdtrain.images.jxl_size import STARTS as JXL_STARTS
from sdtrain.images.jxl_size import jxl_size

IMAGE_EXTENSIONS = ("jpg", "png", "webp", "avif", "jxl")
_READERS = (
    JpegImagePlugin.JpegImageFile,  # and MPO, which begins as a JPEG
    PngImagePlugin.PngImageFile,
    WebPImagePlugin.WebPImageFile,
    GifImagePlugin.GifImageFile,
    BmpImagePlugin.BmpImageFile,
    TiffImagePlugin.TiffImageFile,
)
_FORMATS = tuple(reader.format for reader in _READERS)
"""Others (SVG, PDF, EPS, ICO ...) are rarely photographs and often dangerous."""
# Raised by Pillow's readers for damaged bytes, besides OSError; found by damaging files of many formats.
DAMAGED = (
    *(SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, NotImplementedError, struct.error),
    *(OverflowError, AttributeError, RuntimeError, OSError),
)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GUESSED = ("I", "F", "LAB")


class ImageError(OSError):
    """Bytes that cannot become an image.

    `reason` is "not_an_image", "truncated", "other_format", "too_many_pixels" or "resize_failed"; `detail` has more
    words, the same for the same bytes.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def image_extension(members: Iterable[str]) -> str:
    """The image's extension among a sample's members; KeyError if there is none."""
    for extension in members:
        if extension in IMAGE_EXTENSIONS:
            return extension
    raise KeyError("no image")


def decode_rgb(content: bytes) -> Image.Image:
    """Decodes an image by the rules above; ImageError, an OSError, if it is damaged or not supported."""
    return upright_rgb(open_image(content))


def open_image(content: bytes) -> Image.Image:
    """Opens an image, reading only its header.

    ImageError: "not_an_image", "too_many_pixels" by Pillow's limit, or "truncated" for a JPEG without its end, in which
    Pillow would take junk for data.
    """
    whole = readable(content, Image.MAX_IMAGE_PIXELS or sys.maxsize)
    image = open_readable(whole)
    if image.format in ("JPEG", "MPO") and not is_whole("JPEG", whole):
        raise ImageError("truncated", "the file ends early")
    return image


def open_readable(content: bytes) -> Image.Image:
    """`open_image` for a file that `completeness.readable` returned."""
    if content.startswith(JXL_STARTS) and reads("JXL"):
        _check_jxl_size(content)
    try:
        return Image.open(io.BytesIO(content), formats=_formats(content))
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", "more than can be decoded") from error
    except DAMAGED as error:
        raise ImageError("not_an_image", "no header of an image") from error


def _check_jxl_size(content: bytes) -> None:
    size = jxl_size(content)
    if size is None:
        raise ImageError("not_an_image", "no header of an image")
    if size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or sys.maxsize):
        raise ImageError("too_many_pixels", f"{size[0]} x {size[1]}")


def upright_rgb(image: Image.Image) -> Image.Image:
    """Converts an opened image by the rules above; ImageError "truncated", "not_an_image" or "other_format"."""
    try:
        image.load()
        opaque = _opaque_rgb(image)
        turn = _UPRIGHT.get(orientation_of(image))
        return opaque if turn is None else opaque.transpose(turn)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", "more than can be decoded") from error
    except DAMAGED as error:
        cut = "truncated" in str(error).lower() or isinstance(error, EOFError)
        raise ImageError("truncated" if cut else "not_an_image", "the pixels cannot be decoded") from error


def reads(form: str) -> bool:
    """Whether this machine reads "AVIF" or "JXL"."""
    return bool(_avif() if form == "AVIF" else _jxl())


def _formats(content: bytes) -> tuple[str, ...]:
    """Those to try, with a reader that is imported only when needed."""
    if content[4:8] == b"ftyp":
        return (*_FORMATS, *_avif())
    return (*_FORMATS, *_jxl()) if content.startswith(JXL_STARTS) else _FORMATS


@cache
def _avif() -> tuple[str, ...]:
    """Pillow's AVIF, if it was built with it; one thread an image, because images are decoded side by side."""
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    return ("AVIF",) if AvifImagePlugin.SUPPORTED else ()


@cache
def _jxl() -> tuple[str, ...]:
    try:
        importlib.import_module("pillow_jxl")
    except ImportError:
        return ()
    return ("JXL",) if "JXL" in Image.OPEN else ()


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 if missing or invalid."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DAMAGED:
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def _opaque_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _GUESSED:
        raise ImageError("other_format", f"pixels of Pillow's mode {image.mode}")
    if image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        see_through = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), see_through).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def _from_16_bits(image: Image.Image) -> Image.Image:
    # By hand: Pillow's own conversion clips at 255, so nearly all becomes white.
    gray = np.asarray(image)
    upper = (gray >> 8).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        upper[gray == clear] = 255
    return Image.fromarray(upper).convert("RGB")
