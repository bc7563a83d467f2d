"""Preprocessing of image batches with JPEG decoding and resizing on the GPU.

nvJPEG (through torchvision) and the GPU's resizing round differently from libjpeg and Pillow: most pixels are equal,
the others differ by a few levels, so scores and hashes differ slightly from the CPU's. Anything but a plain JPEG (8-bit
RGB, upright, whole) goes to the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from filters.score.preprocess import (
    WATERMARK_PX,
    PreprocessedImage,
    RequiredViews,
    Sample,
    caption_of,
    describe,
    preprocess,
)
from sdtrain.images.decode import ImageError
from sdtrain.images.header import read_header
from sdtrain.models.clip import Preprocess


def preprocess_on_device(
    samples: Sequence[Sample], required: RequiredViews, device: torch.device, pool: Executor
) -> list[PreprocessedImage]:
    """Preprocesses a batch; the views stay on `device`, and `pool` handles the CPU's share."""
    plain = [i for i, sample in enumerate(samples) if _is_plain_jpeg(sample.image)]
    pixels = _decoded([samples[i].image for i in plain], device)
    found: dict[int, Future[PreprocessedImage]] = {}
    for group in _by_shape(pixels):
        views = _views(torch.stack([pixels[i] for i in group]), required)
        for i, seen in zip(group, views, strict=True):
            found[plain[i]] = pool.submit(_described, samples[plain[i]], required, *seen)
    for position, sample in enumerate(samples):
        if position not in found:
            found[position] = pool.submit(preprocess, sample, required)
    return [found[position].result() for position in range(len(samples))]


def _is_plain_jpeg(content: bytes) -> bool:
    try:
        header = read_header(content, sys.maxsize)
    except ImageError:
        return False
    return header.is_plain and header.extension == "jpg"


def _decoded(contents: list[bytes], device: torch.device) -> list[Tensor]:
    """Decodes to (3, H, W) uint8 each; to nothing if any is damaged, because the decoder does not say which."""
    if not contents:
        return []
    try:
        data = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
        decoded: list[Tensor] = decode_jpeg(data, ImageReadMode.RGB, device=device)
    except RuntimeError:
        return []
    return decoded


def _by_shape(pixels: Sequence[Tensor]) -> list[list[int]]:
    groups: dict[torch.Size, list[int]] = {}
    for position, image in enumerate(pixels):
        groups.setdefault(image.shape, []).append(position)
    return list(groups.values())


def _views(pixels: Tensor, required: RequiredViews) -> Iterator[tuple[Tensor | None, Tensor, Tensor, Tensor]]:
    """Of (B, 3, H, W), yields CLIP's view, the watermark detector's, and on the CPU the latter and the whole image."""
    squashed = _resized(pixels, (WATERMARK_PX, WATERMARK_PX), "bilinear")
    clip = list(_clip_view(pixels, required.clip)) if required.clip else [None] * len(pixels)
    squashed, whole = (values.permute(0, 2, 3, 1).contiguous() for values in (squashed, pixels))
    return zip(clip, squashed, squashed.cpu(), whole.cpu(), strict=True)


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
    sample: Sample, required: RequiredViews, clip: Tensor | None, watermark: Tensor, squashed: Tensor, whole: Tensor
) -> PreprocessedImage:
    image, small = (Image.fromarray(pixels.numpy()) for pixels in (whole, squashed))
    row = describe(sample, image, small)
    return PreprocessedImage(row, caption_of(sample), clip, watermark if required.watermark else None)
