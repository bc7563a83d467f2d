"""Crops an image to the part that the VAE sees."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Size = tuple[int, int]
_MOST_PIXELS = 2**26


@dataclass(frozen=True)
class Crop:
    """The part of an image that the VAE sees: `pixels`, (height, width, 3) uint8.

    `box` is left, top, right and bottom of that part, in pixels of the source, whose width and height are `source_px`.
    """

    pixels: NDArray[np.uint8]
    box: tuple[float, float, float, float]
    source_px: Size


def resize_and_crop(image: Image.Image, size_px: Size, place: float | None) -> Crop:
    """Resizes an RGB image (bicubic, antialiased) to just cover a width and height, then crops it.

    `place` is the relative offset along the excess side, from 0 (left or top) up to 1; None for the centre. The
    original runs cropped at random along the longer side (pesser/stable-diffusion, ldm/data/laion.py: Resize of the
    shorter side, then RandomCrop).
    """
    scale = max(wanted / side for wanted, side in zip(size_px, image.size, strict=True))
    covering = [max(wanted, round(side * scale)) for wanted, side in zip(size_px, image.size, strict=True)]
    spare = [side - wanted for side, wanted in zip(covering, size_px, strict=True)]
    left, top = (room // 2 if place is None else min(room, int(place * (room + 1))) for room in spare)
    edges = (left, top, left + size_px[0], top + size_px[1])
    part = resized_part(image, (covering[0], covering[1]), edges, Image.Resampling.BICUBIC)
    pixels = np.asarray(part)
    return Crop(pixels, tuple(round(edge / scale, 2) for edge in edges), image.size)  # type: ignore[arg-type]


def resized_part(
    image: Image.Image, size_px: Size, edges: tuple[int, int, int, int], resample: Image.Resampling
) -> Image.Image:
    """`image.resize(size_px, resample).crop(edges)`, in memory that does not grow with the sides' ratio.

    A line of 60,000 x 1 pixels would become one of 30,720,000 x 512. Above `_MOST_PIXELS` only the part is computed,
    whose pixels are the same but for rounding.
    """
    if math.prod(size_px) <= _MOST_PIXELS:
        return image.resize(size_px, resample).crop(edges)
    across, down = (side / wanted for side, wanted in zip(image.size, size_px, strict=True))
    left, top, right, bottom = edges
    box = (left * across, top * down, min(image.width, right * across), min(image.height, bottom * down))
    return image.resize((right - left, bottom - top), resample, box)


def seeded_uniform(*names: object) -> float:
    """A number in [0, 1) determined by the names."""
    digest = hashlib.blake2b(" ".join(str(name) for name in names).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def bucket_sizes(resolution: int, step_px: int, max_aspect: float) -> list[Size]:
    """Widths and heights in multiples of `step_px`, with an area of at most, and near, resolution squared.

    The rule of NovelAI's aspect-ratio buckets ("NovelAI Improvements on Stable Diffusion", 2022): for each width the
    largest height that the area allows.
    """
    sizes = set[Size]()
    for width in range(step_px, math.floor(resolution * math.sqrt(max_aspect)) + 1, step_px):
        height = resolution**2 // width // step_px * step_px
        if height and max(width / height, height / width) <= max_aspect:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def bucket_of(image_px: Size, sizes: Sequence[Size]) -> Size:
    """The size whose aspect ratio is nearest to the image's."""
    ratio = math.log(image_px[0] / image_px[1])
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), size))
