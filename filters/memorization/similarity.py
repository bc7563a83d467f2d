"""Whether two images are one: by their pixels and by perceptual hashes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from filters.search.hits import Hit
from sdtrain.images.perceptual_hash import perceptual_hash

MAX_PIXEL_DISTANCE = 0.15
_COMPARED_PX = 256


@dataclass(frozen=True)
class Limits:
    """What counts as memorised.

    Attributes:
        threshold: least cosine of CLIP's embeddings that is flagged.
        radius: bits in which the perceptual hashes of one image may differ.
        top: neighbours that are looked at.
    """

    threshold: float = 0.95
    radius: int = 10
    top: int = 4


@dataclass(frozen=True)
class Neighbour:
    """A training image near a sample.

    Attributes:
        hash_bits: in which the perceptual hashes differ; None where the image is lost.
        pixel_distance: root mean square, of channels from 0 to 1; likewise.
    """

    hit: Hit
    hash_bits: int | None = None
    pixel_distance: float | None = None

    def is_same(self, limits: Limits) -> bool:
        """Whether it is the sample itself, to the pixel check."""
        if self.hash_bits is None or self.pixel_distance is None:
            return False
        return self.hash_bits <= limits.radius and self.pixel_distance <= MAX_PIXEL_DISTANCE

    def is_alike(self, limits: Limits) -> bool:
        """Whether CLIP takes both for nearly the same."""
        return self.hit.nearness >= limits.threshold

    def row(self) -> dict[str, Any]:
        """For JSON."""
        return self.hit.row() | {"hash_bits": self.hash_bits, "pixel_distance": self.pixel_distance}


def compare(sample: Image.Image, hit: Hit, image: Image.Image | None) -> Neighbour:
    """A sample beside a training image, both RGB and of any size; None where the training image is lost."""
    if image is None:
        return Neighbour(hit)
    one, other = _crop(sample), _crop(image)
    bits = (perceptual_hash(one) ^ perceptual_hash(other)) & (2**64 - 1)
    difference = (np.asarray(one, np.float64) - np.asarray(other, np.float64)) / 255
    return Neighbour(hit, bits.bit_count(), round(float(np.sqrt(np.mean(difference**2))), 4))


def _crop(image: Image.Image) -> Image.Image:
    return ImageOps.fit(image, (_COMPARED_PX, _COMPARED_PX), Image.Resampling.BICUBIC)
