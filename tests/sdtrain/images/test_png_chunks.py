"""PNGs with metadata that Pillow refuses: the pixels are kept, and no bomb is unpacked."""

import tracemalloc
import zlib

import numpy as np
import pytest

from sdtrain.dataset.config import DownloadConfig
from sdtrain.images.decode import decode_rgb, orientation_of
from sdtrain.images.header import read_header
from sdtrain.images.png_chunks import readable_png
from sdtrain.images.store import ImageMaker
from tests.sdtrain.download.download_fixtures import encoded, photo
from tests.sdtrain.images.hostile_images import exif_turned, png_chunk

PNG = encoded(photo(2), "png")
BOMB = zlib.compress(bytes(60 * 2**20))
LARGE = zlib.compress(bytes(2**20 + 1))
TEXT = b"Comment\0\1\0\0\0"
XMP = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'


def bad_checksum(kind, data):
    return png_chunk(kind, data)[:-4] + b"oops"


METADATA = {
    "profile": png_chunk(b"iCCP", b"P3\0\0" + LARGE),
    "profile_bomb": png_chunk(b"iCCP", b"P3\0\0" + BOMB),
    "text": png_chunk(b"zTXt", b"Comment\0\0" + LARGE),
    "text_bomb": png_chunk(b"zTXt", b"Comment\0\0" + BOMB),
    "international_bomb": png_chunk(b"iTXt", TEXT + BOMB),
    "orientation_bomb": png_chunk(b"zTXt", b"Raw profile type exif\0\0" + BOMB),
    "unknown_method": png_chunk(b"iCCP", b"P3\0\7" + LARGE),
    "empty_profile": png_chunk(b"iCCP", b""),
    "short_gamma": png_chunk(b"gAMA", b"\0"),
    "checksum": bad_checksum(b"tEXt", b"Comment\0hello"),
    "private": bad_checksum(b"prIv", b"data"),
}


def with_chunk(chunk, content=PNG, behind=False):
    place = len(content) - 12 if behind else 33  # before IEND, or behind IHDR
    return content[:place] + chunk + content[place:]


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_pillow_refuses_cost_no_pixel_and_no_memory(name, behind):
    content = with_chunk(METADATA[name], behind=behind)
    tracemalloc.start()
    decoded = decode_rgb(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(decoded, decode_rgb(PNG))
    assert peak < 6 * 2**20
    for settings in ({"reencode": "if_changed", "encode_format": "png", "encode_quality": 6}, {"reencode": "never"}):
        stored = ImageMaker(DownloadConfig(resize_mode="no", **settings))(content)
        assert np.array_equal(decode_rgb(stored.content), decode_rgb(PNG))


@pytest.mark.parametrize("chunk", ["profile", "text_bomb", "checksum"])
def test_the_orientation_is_kept(chunk):
    turned = (exif_turned(6, "png"), with_chunk(png_chunk(b"iTXt", XMP), encoded(photo(4, 120, 80), "png")))
    for content in turned:
        header = read_header(with_chunk(METADATA[chunk], content), 2**27)
        assert orientation_of(header.image) == 6
        assert not header.is_plain
        assert decode_rgb(with_chunk(METADATA[chunk], content)).size == (80, 120)


def test_many_texts_together_over_pillows_limit_are_left_out():
    content = with_chunk(png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**20))) * 65)
    assert np.array_equal(decode_rgb(content), decode_rgb(PNG))


def test_what_pillow_reads_is_left_as_it_is():
    fine = [(b"iCCP", b"P3\0\0" + zlib.compress(bytes(2**20 - 9))), (b"zTXt", b"A\0\0" + zlib.compress(b"text"))]
    for kind, data in [*fine, (b"iTXt", XMP), (b"tEXt", b"A\0b"), (b"zTXt", b"A"), (b"iTXt", b"broken")]:
        content = with_chunk(png_chunk(kind, data))
        assert readable_png(content, 2**27) is content, data[:20]
        assert decode_rgb(content)


def test_a_cut_png_with_a_large_profile_is_truncated():
    content = with_chunk(METADATA["profile"])
    assert np.array_equal(decode_rgb(content[:-12]), decode_rgb(PNG))
    with pytest.raises(OSError, match="truncated"):
        read_header(content[:-60], 2**27)
