"""Reads an image file's kind and size, and whether the file is whole, before decoding any pixel."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from sdtrain.images.completeness import is_whole, readable
from sdtrain.images.decode import ImageError, open_readable, orientation_of, reads
from sdtrain.images.jxl_size import STARTS as JXL_STARTS

_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "AVIF": "avif", "JXL": "jxl"}
_PLAIN = {"JPEG", "MPO", "PNG", "WEBP"}
# Magic bytes of unsupported image and drawing formats.
_OTHERS = {
    b"%PDF": "PDF", b"%!PS": "PostScript", b"\xc5\xd0\xd3\xc6": "EPS", b"\0\0\1\0": "ICO", b"\0\0\2\0": "CUR",
    b"8BPS": "Photoshop", b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000", b"DDS ": "DDS", b"qoif": "QOI", b"\x76\x2f\x31\x01": "OpenEXR", b"icns": "ICNS",
    b"#?RADIANCE": "Radiance HDR", b"\xd7\xcd\xc6\x9a": "WMF", b"gimp xcf": "XCF",
}  # fmt: skip
_AVIF_BRANDS, _HEIF_BRANDS = {b"avif", b"avis"}, {b"heic", b"heix", b"mif1", b"msf1"}
_TEXT_HEAD_BYTES = 1024


@dataclass(frozen=True)
class Header:
    """The header of an image file, with the `image` opened by Pillow but its pixels not yet decoded.

    Attributes:
        extension: "jpg", "png", "webp", "avif" or "jxl"; None for formats that are not stored unchanged.
        is_plain: a whole JPEG, PNG or WebP of 8-bit RGB, upright, one frame: even a decoder that ignores EXIF, alpha,
            palettes and inks is right.
    """

    image: Image.Image
    extension: str | None
    is_plain: bool


def read_header(content: bytes, max_pixels: int) -> Header:
    """Checks a file's header and end; ImageError: "not_an_image", "other_format", "too_many_pixels" or "truncated"."""
    whole = readable(content, max_pixels)
    if whole[:4] == b"RIFF" and whole[8:12] == b"WEBP" and not is_whole("WEBP", whole):
        raise ImageError("truncated", "the file ends early")  # its reader would say that it is no image
    try:
        image = open_readable(whole)
    except ImageError as error:
        other = _other_format(content)
        if other and error.reason == "not_an_image":
            raise ImageError("other_format", other) from error
        if failure := _failure_of_avif(content, max_pixels):
            raise failure from error
        raise
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too_many_pixels", f"{width} x {height}")
    if width * height == 0:
        raise ImageError("not_an_image", "no pixels")
    if not is_whole(image.format or "", whole):
        raise ImageError("truncated", "the file ends early")
    extension = _EXTENSIONS.get(image.format or "")
    return Header(image, extension, whole is content and _is_plain(image, content))


def _failure_of_avif(content: bytes, max_pixels: int) -> ImageError | None:
    """Why an AVIF was refused, as far as its boxes show."""
    if content[4:8] != b"ftyp":
        return None
    size = content.find(b"ispe") + 8
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (size, size + 4))
    if size > 8 and width * height > max_pixels:
        return ImageError("too_many_pixels", f"{width} x {height}")
    return ImageError("truncated", "the file ends early") if _ends_within_a_box(content) else None


def _ends_within_a_box(content: bytes) -> bool:
    """Whether an ISO base media file (AVIF) is cut."""
    position = 0
    while position + 8 <= len(content):
        size = int.from_bytes(content[position : position + 4], "big")
        if size == 1:
            size = int.from_bytes(content[position + 8 : position + 16], "big")
        if size < 8:  # to the end of the file
            return False
        position += size
    return position != len(content)


def _is_plain(image: Image.Image, content: bytes) -> bool:
    if image.format not in _PLAIN or image.mode != "RGB" or "transparency" in image.info or orientation_of(image) != 1:
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
    if content.startswith(JXL_STARTS):
        return None if reads("JXL") else "JPEG XL"
    if content[4:8] == b"ftyp":
        brands = {content[at : at + 4] for at in range(8, min(int.from_bytes(content[:4], "big"), 256), 4)}
        if brands & _AVIF_BRANDS:
            return None if reads("AVIF") else "AVIF"
        return "HEIF" if brands & _HEIF_BRANDS else None
    head = content[:_TEXT_HEAD_BYTES].lstrip(b"\xef\xbb\xbf\t\r\n ").lower()
    return "SVG" if b"<svg" in head and b"<html" not in head and head.startswith(b"<") else None
