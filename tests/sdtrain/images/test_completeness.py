"""Files cut anywhere: those that hold every pixel are images, with exactly their pixels, and no others are."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdtrain.dataset.config import DownloadConfig
from sdtrain.images.completeness import readable
from sdtrain.images.decode import ImageError, decode_rgb
from sdtrain.images.header import read_header
from sdtrain.images.store import ImageMaker
from tests.sdtrain.download.download_fixtures import encoded, photo
from tests.sdtrain.images.hostile_images import GOOD, animation

WILD = Path(__file__).parents[4] / "shared" / "data" / "wild"
LAST = 40


def noisy(mode="RGB"):
    """Not soft, so that every byte of its file counts."""
    return Image.fromarray(np.random.default_rng(7).integers(0, 256, (51, 83, 3), np.uint8)).convert(mode)


SEQUENTIAL = {
    "baseline": encoded(noisy()),
    "finest": encoded(noisy(), quality=100, subsampling=0),
    "own_tables": encoded(photo(3), optimize=True),
    "zero_at_the_end": encoded(Image.new("RGB", (19, 2), "white"), subsampling=2),
    "gray": encoded(noisy("L")),
    "cmyk": encoded(noisy("CMYK")),
    "restarts": encoded(noisy(), restart_marker_blocks=3),
    "restart_rows": encoded(noisy(), restart_marker_rows=1),
}
PROGRESSIVE = {
    "progressive": encoded(noisy(), progressive=True),
    "progressive_gray": encoded(noisy("L"), progressive=True),
    "progressive_restarts": encoded(noisy(), progressive=True, restart_marker_rows=1),
}
JPEGS = SEQUENTIAL | PROGRESSIVE
PNGS = {
    "png": encoded(noisy(), "png"),
    "palette": encoded(noisy("P"), "png"),
    "bilevel": encoded(noisy("1"), "png"),
    "alpha": encoded(noisy("RGBA"), "png"),
    "16_bits": encoded(Image.fromarray(np.arange(6144, dtype=np.uint16).reshape(64, 96) * 10), "png"),
}
OTHERS = {
    "gif": encoded(noisy(), "gif"),
    "webp": encoded(noisy(), "webp"),
    "webp_lossless": encoded(noisy(), "webp", lossless=True),
    "webp_with_exif": encoded(noisy(), "webp", exif=b"Exif\0\0II*\0" + bytes(30)),
    "avif": encoded(noisy(), "avif"),
}


def make(content):
    """The image as the download stores it, decoded."""
    settings = {"resize_mode": "no", "encode_format": "png", "encode_quality": 1, "reencode": "always"}
    return np.asarray(decode_rgb(ImageMaker(DownloadConfig(**settings))(content).content))


def cuts(content):
    return [*range(1, LAST), *range(LAST, len(content), max(1, len(content) // 25))]


def kept(content, decode):
    """The numbers of missing bytes with which the file is an image; its pixels are then the whole file's."""
    whole, found = decode(content), []
    for missing in cuts(content):
        with contextlib.suppress(ImageError):
            assert np.array_equal(decode(content[:-missing]), whole), missing
            found.append(missing)
    return found


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_may_lack_its_end_marker_or_half_of_it_and_not_one_bit_more(name):
    assert kept(JPEGS[name], make) == [1, 2]
    assert kept(JPEGS[name], lambda content: np.asarray(decode_rgb(content))) == [1, 2]


@pytest.mark.parametrize("name", PNGS)
def test_a_png_may_lack_its_last_chunk_and_checksums(name):
    found = kept(PNGS[name], make)
    assert found[:20] == list(range(1, 21))  # IEND, the checksum of the last IDAT, and zlib's
    assert max(found) < 30


def test_a_gif_may_lack_its_trailer_and_a_webp_what_follows_the_image():
    assert kept(OTHERS["gif"], make) == [1, 2]
    assert kept(OTHERS["webp_with_exif"], make)[:30] == list(range(1, 31))
    for name in ("webp", "webp_lossless", "avif"):
        assert set(kept(OTHERS[name], make)) <= {1}, name  # a byte of padding


@pytest.mark.parametrize("form", ["gif", "webp", "png"])
def test_an_animation_that_lacks_frames_is_truncated(form):
    content = animation(form)
    for missing in (30, len(content) // 2):
        with pytest.raises(ImageError, match="truncated"):
            read_header(content[:-missing], 2**27)


@pytest.mark.parametrize("name", ["baseline", "progressive", "restarts"])
def test_junk_in_the_place_of_lost_data_is_not_taken_for_pixels(name):
    half = JPEGS[name][: len(JPEGS[name]) // 2]
    for junk in (b"<b>Fatal error</b>: out of memory " * 2000, bytes(len(half) * 3), b"\r\n" * 5000):
        for decode in (make, decode_rgb):
            with pytest.raises(ImageError, match="truncated"):
                decode(half + junk)


@pytest.mark.parametrize("ending", [b"", b"\xff", b"\xff\xff", bytes(500), b"\xff" + bytes(3), b"\xff\xd9 and more"])
def test_zeros_in_the_place_of_a_jpegs_end_lose_nothing(ending):
    for content in (JPEGS["baseline"], JPEGS["progressive"]):
        assert np.array_equal(make(content[:-2] + ending), make(content))


def test_a_progressive_jpeg_without_its_last_scan_is_truncated():
    content = PROGRESSIVE["progressive"]
    last = content.rindex(b"\xff\xda")
    table = content.rindex(b"\xff\xc4", 0, last)
    for end in (table, last):
        for ending in (b"", bytes(10)):
            with pytest.raises(ImageError, match="truncated"):
                make(content[:end] + ending)


@pytest.mark.parametrize("size", [0, 7, 100, 2**20, 2**32 - 2])
def test_a_webp_with_a_wrong_size_in_its_head_is_kept(size):
    for name in ("webp", "webp_lossless", "webp_with_exif"):
        content = OTHERS[name]
        wrong = content[:4] + size.to_bytes(4, "little") + content[8:]
        assert np.array_equal(make(wrong), make(content)), name


def test_good_files_are_left_as_they_are():
    completed = {"without_end_marker", "png_without_end", "profile_bomb"}
    for name, content in (GOOD | JPEGS | PNGS | OTHERS).items():
        assert (readable(content) is content) == (name not in completed), name


def test_an_image_without_its_end_over_the_limit_of_pixels_is_not_decoded(monkeypatch):
    monkeypatch.setattr("sdtrain.images.jpeg_end._pixels", lambda content: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="too_many_pixels"):
        read_header(JPEGS["baseline"][:-2], 83 * 51 - 1)


def test_completed_bytes_are_not_stored_as_they_came_unless_asked():
    config = {"image_size": 200, "resize_mode": "no"}
    for content, form in ((JPEGS["baseline"], "JPEG"), (PNGS["png"], "PNG")):
        extension = form.lower().replace("jpeg", "jpg")
        quality = {"encode_quality": 6} if form == "PNG" else {}
        changed = ImageMaker(DownloadConfig(encode_format=extension, **config, **quality))(content[:-2])
        Image.open(io.BytesIO(changed.content)).load()  # by any reader
        never = ImageMaker(DownloadConfig(reencode="never", **config))(content[:-2])
        assert never.content == content[:-2]
        assert np.array_equal(decode_rgb(never.content), decode_rgb(content))


@pytest.mark.skipif(not WILD.exists(), reason="no files beside the checkout")
@pytest.mark.parametrize("name", ["no-end-marker.jpg", "large-icc-profile.png", "photo.avif"])
def test_files_as_they_occur_outside_are_kept(name):
    content = (WILD / name).read_bytes()
    assert make(content).shape == (600, 600, 3)
    never = ImageMaker(DownloadConfig(reencode="never", resize_mode="no"))(content)
    assert (never.content, never.extension) == (content, Path(name).suffix[1:])
