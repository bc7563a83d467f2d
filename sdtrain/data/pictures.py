"""Pictures out of tar members."""

from __future__ import annotations

import io
from collections.abc import Iterable

from PIL import Image

PICTURE_EXTENSIONS = ("jpg", "png", "webp")


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
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises for damaged headers
        raise OSError(str(error)) from error
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        opaque = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(opaque, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")
