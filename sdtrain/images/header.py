"""Reads an image file's kind and size, and whether the file is whole, before decoding any pixel."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from sdtrain.images.decode import ImageError, open_image, orientation_of

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# Magic bytes of unsupported image and drawing formats.
_OTHERS = {
    b"%PDF": "PDF", b"%!PS": "PostScript", b"\xc5\xd0\xd3\xc6": "EPS", b"\0\0\1\0": "ICO", b"\0\0\2\0": "CUR",
    b"8BPS": "Photoshop", b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000", b"DDS ": "DDS", b"qoif": "QOI", b"\x76\x2f\x31\x01": "OpenEXR", b"icns": "ICNS",
    b"#?RADIANCE": "Radiance HDR", b"\xd7\xcd\xc6\x9a": "WMF", b"gimp xcf": "XCF",
}  # fmt: skip
_ISO_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIF", b"heix": "HEIF", b"mif1": "HEIF", b"msf1": "HEIF"}
_TEXT_HEAD_BYTES = 1024
_PNG_END = b"IEND\xaeB`\x82"
_JPEG_END = b"\xff\xd9"


@dataclass(frozen=True)
class Header:
    """The header of an image file, with the `image` opened by Pillow but its pixels not yet decoded.

    Attributes:
        extension: "jpg", "png" or "webp"; None for formats that are not stored unchanged.
        is_plain: 8-bit RGB, upright, one frame: even a decoder that ignores EXIF, alpha, palettes and inks is right.
    """

    image: Image.Image
    extension: str | None
    is_plain: bool


def read_header(content: bytes, max_pixels: int) -> Header:
    """Checks a file's header and end; ImageError: "not_an_image", "other_format", "too_many_pixels" or "truncated"."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP" and not _is_whole("WEBP", content):
        raise ImageError("truncated", "the file ends early")  # its reader would say that it is no image
    try:
        image = open_image(content)
    except ImageError as error:
        other = _other_format(content)
        if other and error.reason == "not_an_image":
            raise ImageError("other_format", other) from error
        raise
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too_many_pixels", f"{width} x {height}")
    if width * height == 0:
        raise ImageError("not_an_image", "no pixels")
    if not _is_whole(image.format or "", content):
        raise ImageError("truncated", "the file ends early")
    extension = _EXTENSIONS.get(image.format or "")
    return Header(image, extension, extension is not None and _is_plain(image, content))


def _is_plain(image: Image.Image, content: bytes) -> bool:
    if image.mode != "RGB" or "transparency" in image.info or orientation_of(image) != 1:
        return False
    if image.format == "PNG":
        bit_depth = content[24]
        # An eXIf chunk may follow the pixels, beyond what reading the header has seen.
        return bit_depth == 8 and not getattr(image, "is_animated", False) and b"eXIf" not in content
    return image.format != "WEBP" or not getattr(image, "is_animated", False)


def _other_format(content: bytes) -> str | None:
    for signature, name in _OTHERS.items():
        if content.startswith(signature):
            return name
    if content[4:8] == b"ftyp":
        return _ISO_BRANDS.get(content[8:12])
    head = content[:_TEXT_HEAD_BYTES].lstrip(b"\xef\xbb\xbf\t\r\n ").lower()
    return "SVG" if b"<svg" in head and b"<html" not in head and head.startswith(b"<") else None


def _is_whole(form: str, content: bytes) -> bool:
    """Whether the file is complete; decoders silently fill missing data with gray."""
    if form in ("JPEG", "MPO"):
        return content.find(_JPEG_END, _first_scan(content)) != -1
    if form == "PNG":
        return _PNG_END in content
    if form == "WEBP":
        return int.from_bytes(content[4:8], "little") + 8 <= len(content)
    if form == "GIF":
        return _reaches_gif_end(content)
    return True  # BMP and TIFF: the decoder notices


def _first_scan(content: bytes) -> int:
    """The start of the compressed data; an end marker before it belongs to a thumbnail."""
    position = 2
    while position + 4 <= len(content):
        if content[position] != 0xFF:
            position += 1  # decoders skip anything else between segments
            continue
        marker = content[position + 1]
        if marker == 0xDA:
            return position
        if marker in (0xFF, 0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            position += 1 if marker == 0xFF else 2
            continue
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return len(content)


def _reaches_gif_end(content: bytes) -> bool:
    """Whether the blocks lead to the trailer, or to junk in its place, which loses no data."""
    position = 13 + _gif_table_bytes(content[10])
    while position < len(content):
        kind = content[position]
        if kind == 0x21:
            position = _after_sub_blocks(content, position + 2)
        elif kind == 0x2C and position + 9 < len(content):
            position = _after_sub_blocks(content, position + 11 + _gif_table_bytes(content[position + 9]))
        else:
            return kind != 0x2C
    return False


def _gif_table_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _after_sub_blocks(content: bytes, position: int) -> int:
    while position < len(content) and content[position]:
        position += content[position] + 1
    return position + 1
