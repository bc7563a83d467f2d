"""Preprocessing of image batches with JPEG decoding and resizing on the GPU.

nvJPEG (through TorchCodec or torchvision) and the GPU's resizing round differently from libjpeg and Pillow: most pixels
are equal, the others differ by a few levels, so scores and hashes differ slightly from the CPU's. Anything but a plain
JPEG (8-bit RGB, upright, whole) goes to the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from filters.score.jpeg_decoder import JpegDecoder
from filters.score.preprocess import (
    SSCD_PX,
    WATERMARK_PX,
    Measured,
    PreprocessedImage,
    RequiredViews,
    Sample,
    caption_of,
    describe,
    preprocess,
    thumbnail,
)
from sdtrain.images.decode import ImageError
from sdtrain.images.header import read_header
from sdtrain.models.clip import Preprocess
from sdtrain.models.copies import PendingCopy, copies_of

_MAX_RATIO = 32


def preprocess_on_device(
    samples: Sequence[Sample], required: RequiredViews, decoder: JpegDecoder, pool: Executor
) -> list[PreprocessedImage]:
    """Preprocesses a batch; the views stay on the decoder's device, and `pool` handles the CPU's share.

    A GPU works on a stream of its own, beside the networks'.
    """
    found: dict[int, Future[PreprocessedImage]] = {}
    plain = [i for i, sample in enumerate(samples) if _is_plain_jpeg(sample.image)]
    with _beside_the_networks(decoder.device):
        pixels = dict(zip(plain, decoder.decode([samples[i].image for i in plain]), strict=True))
        for position, sample in enumerate(samples):
            if pixels.get(position) is None:
                found[position] = pool.submit(preprocess, sample, required)
        decoded = {position: image for position, image in pixels.items() if image is not None}
        groups = [
            (group, _Views.of(torch.stack([decoded[i] for i in group]), required)) for group in _by_shape(decoded)
        ]
    for group, views in groups:
        for i, seen in zip(group, views.wait(), strict=True):
            found[i] = pool.submit(_described, samples[i], required, *seen)
    return [found[position].result() for position in range(len(samples))]


@contextmanager
def _beside_the_networks(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(_stream(device)):
        yield


@lru_cache(maxsize=8)
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _is_plain_jpeg(content: bytes) -> bool:
    try:
        header = read_header(content, sys.maxsize)
    except ImageError:
        return False
    # Its view would be as long as the sides' ratio.
    is_thin = max(header.image.size) > _MAX_RATIO * min(header.image.size)
    return header.is_plain and header.extension == "jpg" and not is_thin


def _by_shape(pixels: Mapping[int, Tensor]) -> list[list[int]]:
    groups: dict[torch.Size, list[int]] = {}
    for position, image in pixels.items():
        groups.setdefault(image.shape, []).append(position)
    return list(groups.values())


@dataclass(frozen=True)
class _Views:
    """Views of images of one shape: the networks', and copies of the watermark detector's and of the whole images."""

    clip: Sequence[Tensor | None]
    watermark: Tensor
    sscd: Sequence[Tensor | None]
    squashed: PendingCopy
    whole: PendingCopy

    @classmethod
    def of(cls, pixels: Tensor, required: RequiredViews) -> _Views:
        """Begins to make those of (B, 3, H, W) uint8."""
        squashed = _resized(pixels, (WATERMARK_PX, WATERMARK_PX), "bilinear")
        squashed, whole = (values.permute(0, 2, 3, 1).contiguous() for values in (squashed, pixels))
        clip = _clip_view(pixels, required.clip) if required.clip else None
        sscd = _resized(pixels, (SSCD_PX, SSCD_PX), "bilinear").permute(0, 2, 3, 1) if required.sscd else None
        copies = copies_of(pixels.device)
        for kept in (squashed, clip, sscd):
            if kept is not None and kept.is_cuda:  # the networks read it on another stream than it was allocated on
                kept.record_stream(torch.cuda.default_stream(kept.device))
        clips, sscds = ([None] * len(pixels) if views is None else list(views) for views in (clip, sscd))
        return cls(clips, squashed, sscds, copies.to_host(squashed), copies.to_host(whole))

    def wait(self) -> Iterator[tuple[Tensor | None, Tensor, Tensor | None, Tensor, Tensor]]:
        """Yields an image's views, once its copies have arrived; all that was queued before them is done then."""
        return zip(self.clip, self.watermark, self.sscd, self.squashed.wait(), self.whole.wait(), strict=True)


def _clip_view(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    height, width = pixels.shape[-2:]
    wide, high = preprocess.resized_px(width, height)
    left, top = preprocess.centre(wide, high)
    resized = _resized(pixels, (high, wide), preprocess.resample)
    side = preprocess.size_px
    return resized[..., top : top + side, left : left + side].permute(0, 2, 3, 1)


def _resized(pixels: Tensor, size: tuple[int, int], resample: str) -> Tensor:
    resized: Tensor = resize(pixels, list(size), InterpolationMode(resample), antialias=True)
    return resized


def _described(
    sample: Sample,
    required: RequiredViews,
    clip: Tensor | None,
    watermark: Tensor,
    sscd: Tensor | None,
    squashed: Tensor,
    whole: Tensor,
) -> PreprocessedImage:
    pixels = whole.numpy()
    measured = Measured(pixels, thumbnail(pixels), Image.fromarray(squashed.numpy()))
    row = describe(sample, Image.fromarray(pixels), measured, required)
    return PreprocessedImage(row, caption_of(sample), clip, watermark if required.watermark else None, sscd)
