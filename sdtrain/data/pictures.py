"""Pictures out of tar members."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable

from PIL import Image

PICTURE_EXTENSIONS = ("jpg", "png", "webp")
# What Pillow's readers raise for damaged bytes, beside OSError; found by damaging files of many formats.
_DAMAGED = (
    *(SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, NotImplementedError, struct.error),
    Image.DecompressionBombError,
)


def picture_extension(members: Iterable[str]) -> str:
    """Which of a sample's members is the picture.

    Raises:
        KeyError: none is.
    """
    for extension in members:
        if extension in PICTURE_EXTENSIONS:
            return extension
    raise KeyError("no picture")


def decode_rgb(content: bytes) -> Image.Image:
    """The decoded picture in RGB; transparency is laid on white.

    Raises:
        OSError: the bytes are not a whole picture.
    """
    try:
        picture = Image.open(io.BytesIO(content))
        picture.load()
    except _DAMAGED as error:
        raise OSError(str(error)) from error
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        opaque = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(opaque, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")
