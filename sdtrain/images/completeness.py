"""Tells whether a file holds all of its image, and completes one that lacks only what no pixel needs.

| file | what it may lack, or have too much of |
|---|---|
| JPEG | its end marker, or half of it (`sdtrain.images.jpeg_end`) |
| PNG | its last chunk, and checksums before it; small metadata (`sdtrain.images.png_chunks`) |
| WebP | what follows the image; a right size in its head |
| GIF | its trailer, and the end of its only image's block |

Decoders fill missing pixels without a word, so every other file that ends early counts as truncated.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from sdtrain.images.jpeg_end import END as JPEG_END
from sdtrain.images.jpeg_end import first_scan, with_end
from sdtrain.images.png_chunks import END as PNG_END
from sdtrain.images.png_chunks import SIGNATURE, readable_png

_JPEG_START = b"\xff\xd8\xff"
_GIF_EXTENSION, _GIF_IMAGE, _GIF_CONTROL = 0x21, 0x2C, b"\xf9"
_WEBP_IMAGES = (b"VP8 ", b"VP8L")


def readable(content: bytes, max_pixels: int = sys.maxsize) -> bytes:
    """The file as every decoder reads it: the same object if it is so already, or lacks pixels.

    To complete a JPEG, it is decoded a few times, if it has at most `max_pixels`.
    """
    if content.startswith(_JPEG_START) and not is_whole("JPEG", content):
        return with_end(content, max_pixels) or content
    if content.startswith(SIGNATURE):
        return readable_png(content, max_pixels)
    return _readable_webp(content) if _is_webp(content) else content


def is_whole(form: str, content: bytes) -> bool:
    """Whether a file of Pillow's format `form` is complete, as far as its decoder would not notice."""
    if form in ("JPEG", "MPO"):
        return content.rfind(JPEG_END, first_scan(content)) != -1  # from behind, where it usually is
    if form == "PNG":
        return PNG_END[4:] in content
    if form == "WEBP":
        return _riff_end(content) <= len(content)
    if form == "GIF":
        return _holds_gif(content)
    return True  # AVIF, BMP and TIFF: the decoder notices


def _is_webp(content: bytes) -> bool:
    return content[:4] == b"RIFF" and content[8:12] == b"WEBP"


def _riff_end(content: bytes) -> int:
    return int.from_bytes(content[4:8], "little") + 8


def _readable_webp(content: bytes) -> bytes:
    """With the right size in its head, and without a cut chunk at its end, if the image is there; animations stay."""
    chunks = list(_riff_chunks(content))
    images = [end for kind, end in chunks if kind in _WEBP_IMAGES]
    if not images or images[0] <= _riff_end(content) <= len(content):
        return content
    body = content[12 : chunks[-1][1]]
    body += b"\0" * (len(body) % 2)
    return b"RIFF" + (len(body) + 4).to_bytes(4, "little") + b"WEBP" + body


def _riff_chunks(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Yields the kind, and the end of the data, of every chunk that is all there, whatever the head says."""
    position = 12
    while position + 8 <= len(content):
        size = int.from_bytes(content[position + 4 : position + 8], "little")
        if position + 8 + size > len(content):
            return
        yield content[position : position + 4], position + 8 + size
        position += 8 + size + size % 2


def _holds_gif(content: bytes) -> bool:
    """Whether no image but the first may be cut, which its decoder notices; junk behind the blocks loses nothing."""
    position, num_images = 13 + _gif_table_bytes(content[10]), 0
    while position < len(content):
        kind = content[position]
        if kind == _GIF_EXTENSION:
            is_of_an_image = content[position + 1 : position + 2] == _GIF_CONTROL
            position = _after_sub_blocks(content, position + 2)
            if is_of_an_image and num_images and position >= len(content):
                return False
        elif kind == _GIF_IMAGE:
            if position + 9 >= len(content):
                return False
            position = _after_sub_blocks(content, position + 11 + _gif_table_bytes(content[position + 9]))
            num_images += 1
        else:
            return num_images > 0
    return num_images == 1 or (num_images > 1 and position == len(content))


def _gif_table_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _after_sub_blocks(content: bytes, position: int) -> int:
    """The place behind the blocks' end, which is past the end of the content if they have none."""
    while position < len(content) and content[position]:
        position += content[position] + 1
    return position + 1
