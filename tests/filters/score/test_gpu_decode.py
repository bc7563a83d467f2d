"""What a GPU does here, torch does on the CPU by the same calls: only nvJPEG itself is not in these tests."""

import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from filters.score import jpeg_decoder
from filters.score.gpu_decode import preprocess_on_device
from filters.score.jpeg_decoder import NO_MEMORY, REFUSED, Fallbacks, JpegDecoder, require_decoder, why_no_decoder
from filters.score.preprocess import RequiredViews, Sample, preprocess
from sdtrain.errors import UserError
from sdtrain.models.clip import Preprocess
from tests.image_fixtures import encoded, scene_image

WANTED = RequiredViews(Preprocess(64), watermark=True, sscd=True)
CPU = torch.device("cpu")


def sample(content, number=0, form="jpg"):
    return Sample(f"key{number}", f"uid{number}", {form: content, "txt": b"a caption"})


def on_device(samples, wanted=WANTED, fallbacks=None):
    with ThreadPoolExecutor(2) as pool:
        return preprocess_on_device(samples, wanted, JpegDecoder(CPU, fallbacks or Fallbacks()), pool)


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
    name, original = jpeg_decoder.find_decoder()

    def decode(contents, device):
        calls.append(len(contents))
        return original(contents, device)

    monkeypatch.setattr(jpeg_decoder, "find_decoder", lambda: (name, decode))
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
        for ours, theirs in ((item.clip, wanted.clip), (item.watermark, wanted.watermark), (item.sscd, wanted.sscd)):
            assert ours.shape == theirs.shape
            assert ours.dtype == torch.uint8
            assert np.abs(ours.int() - theirs.int()).float().mean() < 1
    assert decoded == [3], "one call for the plain JPEGs, and the CPU for all others"


@pytest.fixture
def failing(monkeypatch):
    """A decoder that fails with the given error for batches in which `fails` finds something."""

    def install(error, fails=lambda contents: True):
        original = jpeg_decoder.find_decoder()[1]

        def decode(contents, device):
            if fails([bytes(content.numpy()) for content in contents]):
                raise error
            return original(contents, device)

        monkeypatch.setattr(jpeg_decoder, "find_decoder", lambda: ("some library", decode))

    return install


def test_an_image_that_the_decoder_refuses_goes_to_the_cpu_alone_and_is_counted(failing, caplog):
    # Whole at both ends, and nonsense between: the header does not show it.
    broken = bytearray(encoded(scene_image(1)))
    broken[-400:-2] = b"\xff\xc0" * 199
    failing(RuntimeError("nvjpegDecodeBatched failed: 5"), lambda contents: bytes(broken) in contents)
    samples = [sample(encoded(scene_image(n)), n) for n in range(7)]
    samples[3], samples[5] = sample(bytes(broken), 3), sample(bytes(broken), 5)
    fallbacks = Fallbacks()
    found = on_device(samples, fallbacks=fallbacks)
    assert [item.row for item in (found[3], found[5])] == [preprocess(samples[n], WANTED).row for n in (3, 5)]
    assert (fallbacks.counts, fallbacks.num_decoded) == ({REFUSED: 2}, 5)
    fallbacks.report()
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"An image goes to the CPU, {REFUSED}: nvjpegDecodeBatched failed: 5. Others are counted.",
        f"The CPU decoded 2 {REFUSED}; the GPU 5.",
    ]


def test_too_little_memory_for_a_batch_is_enough_for_its_halves_and_said_where_it_is_not(failing, decoded, caplog):
    fallbacks, samples = Fallbacks(), [sample(encoded(scene_image(n)), n) for n in range(8)]
    failing(torch.OutOfMemoryError("CUDA out of memory"), lambda contents: len(contents) > 2)
    whole = on_device(samples, fallbacks=fallbacks)
    assert decoded == [2] * 4
    assert (dict(fallbacks.counts), fallbacks.num_decoded, caplog.records) == ({}, 8, [])
    failing(torch.OutOfMemoryError("CUDA out of memory"))
    assert [item.row["key"] for item in on_device(samples[:3], fallbacks=fallbacks)] == [
        item.row["key"] for item in whole[:3]
    ]
    assert fallbacks.counts == {NO_MEMORY: 3}
    assert len(caplog.records) == 1


def test_a_gpu_that_is_lost_is_no_damaged_image(failing):
    failing(torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        on_device(MIXED)


def test_a_gpu_without_a_decoder_is_refused_or_told_of_before_any_image(failing, caplog):
    cuda = torch.device("cuda")
    assert why_no_decoder(CPU) is None
    assert not require_decoder(CPU, "auto")
    failing(RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nand more"))
    with pytest.raises(
        UserError, match=r"score\.decode: gpu cannot work here: some library: .*nvJPEG support\. Install"
    ):
        require_decoder(cuda, "gpu")
    assert not require_decoder(cuda, "cpu")
    assert caplog.records == []
    assert not require_decoder(cuda, "auto")
    assert "JPEGs are decoded on the CPU (score.decode: auto)" in caplog.text


def test_a_gpu_with_a_decoder_is_used(monkeypatch):
    asked = []
    monkeypatch.setattr(jpeg_decoder, "find_decoder", lambda: ("works", lambda contents, device: asked.append(device)))
    assert require_decoder(torch.device("cuda", 1), "gpu")
    assert require_decoder(torch.device("cuda", 1), "auto")
    assert asked == [torch.device("cuda", 1)] * 2


def test_torchcodec_is_taken_where_it_can_decode_images_and_torchvision_without_its_warning_elsewhere(monkeypatch):
    asked = []

    def decode_jpeg(contents, *, mode, device):
        asked.append((mode, str(device)))
        return [torch.zeros(3, 8, 8, dtype=torch.uint8) for _ in contents]

    jpeg_decoder.find_decoder.cache_clear()
    for decoders, name in (
        (SimpleNamespace(decode_jpeg=decode_jpeg), "torchcodec"),
        (SimpleNamespace(), "torchvision"),
    ):
        monkeypatch.setitem(sys.modules, "torchcodec", SimpleNamespace(decoders=decoders))
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
        found, decode = jpeg_decoder.find_decoder()
        assert found == name
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (image,) = decode([torch.frombuffer(bytearray(encoded(scene_image(0))), dtype=torch.uint8)], CPU)
        assert image.shape[0] == 3
        jpeg_decoder.find_decoder.cache_clear()
    assert asked == [("RGB", "cpu")]


def test_views_that_no_network_wants_are_not_kept():
    (item,) = on_device(MIXED[:1], RequiredViews(None, watermark=False))
    assert (item.clip, item.watermark, item.sscd) == (None, None, None)
