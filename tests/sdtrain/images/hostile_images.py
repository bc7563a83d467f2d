"""Bodies that come in place of good images, by name, each with the reason that it must end in."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from tests.sdtrain.download.download_fixtures import encoded, photo


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width: int, height: int, pixels: bytes = b"\0" * 100) -> bytes:
    """A PNG whose head promises a size, whatever comes."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def jpeg_of_size(width: int, height: int) -> bytes:
    """A small JPEG whose head promises another size."""
    content = bytearray(encoded(photo(1)))
    place = content.index(b"\xff\xc0")
    content[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def jpeg_with_thumbnail() -> bytes:
    """A JPEG whose EXIF block holds a whole JPEG of its own, end marker and all."""
    thumbnail = encoded(photo(1, 32, 32))
    return encoded(photo(2, 200, 150), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + thumbnail)


def animation(form: str) -> bytes:
    frames = [photo(n, 40, 30) for n in range(3)]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:])


def avif_of_size(width: int, height: int) -> bytes:
    """A small AVIF whose head promises another size."""
    place = AVIF.index(b"ispe") + 8
    return AVIF[:place] + struct.pack(">II", width, height) + AVIF[place + 8 :]


def iso_file(brand: bytes) -> bytes:
    return struct.pack(">I", 24) + b"ftyp" + brand + b"\0\0\0\0mif1" + bytes(200)


PHOTO = encoded(photo(2, 200, 150))
PNG, WEBP, GIF = (encoded(photo(2, 200, 150), form) for form in ("png", "webp", "gif"))
AVIF = encoded(photo(2, 200, 150), "avif")
PAGE = b"<!DOCTYPE html><html><body><h1>Not here any more</h1><svg></svg></body></html>"
SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><rect width="9"/></svg>'

HOSTILE: dict[str, tuple[bytes, str]] = {
    "page": (PAGE, "not_an_image"),
    "text": (b"404 not found", "not_an_image"),
    "json": (b'{"error": "gone"}', "not_an_image"),
    "one_byte": (b"\xff", "not_an_image"),
    "zeros": (bytes(5000), "not_an_image"),
    "noise": (np.random.default_rng(1).bytes(5000), "not_an_image"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0\0\0" + bytes(90), "not_an_image"),
    "video": (struct.pack(">I", 24) + b"ftypisom" + bytes(300), "not_an_image"),
    "jpeg_marker_alone": (b"\xff\xd8\xff\xe0", "not_an_image"),
    "jpeg_without_size": (PHOTO[:20] + b"\xff\xd9", "not_an_image"),
    "png_signature_alone": (PNG[:8], "not_an_image"),
    "png_without_pixels": (png_of_size(10, 10, b""), "not_an_image"),
    "png_zero_wide": (png_of_size(0, 10), "not_an_image"),
    "jpeg_zero_high": (jpeg_of_size(10, 0), "not_an_image"),
    "webp_head_alone": (WEBP[:16], "truncated"),
    "jpeg_cut": (PHOTO[:-50], "truncated"),
    "jpeg_cut_in_half": (PHOTO[: len(PHOTO) // 2], "truncated"),
    "jpeg_cut_behind_its_thumbnail": (jpeg_with_thumbnail()[:-200], "truncated"),
    "png_cut": (PNG[:-40], "truncated"),
    "png_cut_in_half": (PNG[: len(PNG) // 2], "truncated"),
    "webp_cut": (WEBP[:-20], "truncated"),
    "gif_cut": (GIF[:-300], "truncated"),
    "gif_animation_cut": (animation("gif")[:-300], "truncated"),
    "webp_animation_cut": (animation("webp")[:-30], "truncated"),
    "bmp_cut": (encoded(photo(2), "bmp")[:-300], "truncated"),
    "tiff_cut": (encoded(photo(2), "tiff")[:-300], "truncated"),
    "png_bomb": (png_of_size(50_000, 50_000), "too_many_pixels"),
    "jpeg_bomb": (jpeg_of_size(65_500, 65_500), "too_many_pixels"),
    "gif_bomb": (GIF[:6] + struct.pack("<HH", 65_535, 65_535) + GIF[10:], "too_many_pixels"),
    "svg": (SVG, "other_format"),
    "svg_without_head": (b"  " + SVG[22:], "other_format"),
    "pdf": (b"%PDF-1.7\n" + bytes(200), "other_format"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n" + bytes(200), "other_format"),
    "ico": (encoded(photo(1, 32, 32), "ico"), "other_format"),
    "heif": (iso_file(b"heic"), "other_format"),
    "avif_head_alone": (iso_file(b"avif"), "not_an_image"),
    "avif_cut": (AVIF[:-20], "truncated"),
    "avif_cut_in_its_head": (AVIF[:200], "truncated"),
    "avif_bomb": (avif_of_size(30_000, 30_000), "too_many_pixels"),
    "jpeg_xl": (b"\xff\x0a" + bytes(200), "other_format"),
    "jpeg_2000": (encoded(photo(1, 32, 32), "jpeg2000"), "other_format"),
    "photoshop": (b"8BPS\0\1" + bytes(200), "other_format"),
    "float_tiff": (encoded(Image.new("F", (9, 9)), "tiff"), "other_format"),
    "a_line_of_pixels": (encoded(Image.new("RGB", (70_000, 1)), "png"), "resize_failed"),
}
"""Name -> body, reason."""


def exif_turned(orientation: int, form: str = "jpeg") -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(photo(4, 120, 80), form, exif=exif)


def polyglot() -> bytes:
    """A whole GIF with a page behind it."""
    return GIF + b"<script>alert(1)</script>"


GOOD: dict[str, bytes] = {
    "jpeg": PHOTO,
    "png": PNG,
    "webp": WEBP,
    "gif": GIF,
    "bmp": encoded(photo(2), "bmp"),
    "tiff": encoded(photo(2), "tiff", compression="tiff_lzw"),
    "avif": AVIF,
    "avif_animation": animation("avif"),
    "clear_avif": encoded(photo(2, mode="RGBA"), "avif"),
    "without_end_marker": PHOTO[:-2],
    "png_without_end": PNG[:-12],
    "profile_bomb": PNG[:33] + png_chunk(b"iCCP", b"P3\0\0" + zlib.compress(bytes(2**22))) + PNG[33:],
    "progressive": encoded(photo(2, 200, 150), progressive=True),
    "gray_jpeg": encoded(photo(2, mode="L")),
    "cmyk_jpeg": encoded(photo(2, mode="CMYK")),
    "palette_png": encoded(photo(2, mode="P"), "png"),
    "bilevel_png": encoded(photo(2, mode="1"), "png"),
    "gray_16_png": encoded(Image.fromarray(np.arange(6144, dtype=np.uint16).reshape(64, 96) * 10), "png"),
    "clear_png": encoded(photo(2, mode="RGBA"), "png"),
    "gif_animation": animation("gif"),
    "webp_animation": animation("webp"),
    "png_animation": animation("png"),
    "tiff_pages": animation("tiff"),
    "one_pixel": encoded(Image.new("RGB", (1, 1), "red"), "png"),
    "junk_behind_jpeg": PHOTO + b"\0" * 100 + b"and more",
    "junk_behind_png": PNG + b"and more",
    "thumbnail": jpeg_with_thumbnail(),
    "corrupt_exif": encoded(photo(2), exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "polyglot": polyglot(),
    **{f"turned_{n}": exif_turned(n) for n in range(2, 9)},
}
"""Name -> body of images that are had."""


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))
