"""What a GPU does here, torch does on the CPU by the same calls: only nvJPEG itself is not in these tests."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from filters.score import gpu_decode
from filters.score.gpu_decode import preprocess_on_device
from filters.score.preprocess import RequiredViews, Sample, preprocess
from sdtrain.models.clip import Preprocess
from tests.image_fixtures import encoded, scene_image

WANTED = RequiredViews(Preprocess(64), watermark=True)
CPU = torch.device("cpu")


def sample(content, number=0, form="jpg"):
    return Sample(f"key{number}", f"uid{number}", {form: content, "txt": b"a caption"})


def on_device(samples, wanted=WANTED):
    with ThreadPoolExecutor(2) as pool:
        return preprocess_on_device(samples, wanted, CPU, pool)


def turned(image):
    exif = Image.Exif()
    exif[274] = 6
    return encoded(image, exif=exif)


MIXED = [
    sample(encoded(scene_image(0)), 0),
    sample(encoded(scene_image(1), "png"), 1, "png"),
    sample(encoded(scene_image(2, 120, 70)), 2),
    sample(encoded(scene_image(3))[:700], 3),
    sample(turned(scene_image(4)), 4),
    sample(encoded(scene_image(5).convert("CMYK")), 5),
    sample(encoded(scene_image(6).convert("L")), 6),
    sample(encoded(scene_image(7)), 7),
    sample(b"", 8),
]


@pytest.fixture
def decoded(monkeypatch):
    """How many images the decoder was given at each call."""
    calls = []

    def decode(contents, *arguments, **options):
        calls.append(len(contents))
        return original(contents, *arguments, **options)

    original = gpu_decode.decode_jpeg
    monkeypatch.setattr(gpu_decode, "decode_jpeg", decode)
    return calls


def test_it_sees_nearly_what_the_cpu_sees_and_says_the_same_of_it(decoded):
    for item, wanted in zip(on_device(MIXED), (preprocess(s, WANTED) for s in MIXED), strict=True):
        assert item.caption == wanted.caption
        assert item.row.keys() == wanted.row.keys()
        for name in ("key", "uid", "reason", "image_width", "image_height"):
            assert item.row.get(name) == wanted.row.get(name)
        if wanted.is_damaged:
            continue
        assert (item.row["phash"] ^ wanted.row["phash"]).bit_count() <= 2
        assert item.row["contrast"] == pytest.approx(wanted.row["contrast"], abs=0.01)
        for ours, theirs in ((item.clip, wanted.clip), (item.watermark, wanted.watermark)):
            assert ours.shape == theirs.shape
            assert ours.dtype == torch.uint8
            assert np.abs(ours.int() - theirs.int()).float().mean() < 1
    assert decoded == [3], "one call for the plain JPEGs, and the CPU for all others"


def test_where_the_decoder_fails_the_cpu_says_what_is_damaged(monkeypatch):
    def fail(contents, *arguments, **options):
        raise RuntimeError("nvjpegDecodeBatched failed: 5")

    monkeypatch.setattr(gpu_decode, "decode_jpeg", fail)
    # Whole at both ends, and nonsense between: the header does not show it.
    broken = bytearray(encoded(scene_image(1)))
    broken[-400:-2] = b"\xff\xc0" * 199
    samples = [sample(encoded(scene_image(0)), 0), sample(bytes(broken), 1)]
    found, wanted = on_device(samples), [preprocess(s, WANTED) for s in samples]
    assert [item.row for item in found] == [item.row for item in wanted]


def test_views_that_no_network_wants_are_not_kept():
    (item,) = on_device(MIXED[:1], RequiredViews(None, watermark=False))
    assert (item.clip, item.watermark) == (None, None)
