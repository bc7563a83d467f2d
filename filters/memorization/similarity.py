"""Image similarity by pixels and perceptual hashes, and calibration of a cosine limit on a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from filters.search.hits import Hit
from filters.search.search import Search
from sdtrain.images.perceptual_hash import perceptual_hash

MAX_PIXEL_DISTANCE = 0.15
_COMPARED_PX = 256
_NUM_CALIBRATED = 256
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Limits:
    """The limits beyond which a sample counts as memorised, and the number of neighbours to compare (`top`).

    `threshold` is the least CLIP cosine to flag; `radius` the bits in which perceptual hashes may differ.
    """

    threshold: float = 0.95
    radius: int = 10
    top: int = 4


@dataclass(frozen=True)
class Neighbour:
    """A training image near a sample; None for both distances if the image is lost.

    Attributes:
        hash_bits: differing bits of the perceptual hashes.
        pixel_distance: root mean square, of channels from 0 to 1.
    """

    hit: Hit
    hash_bits: int | None = None
    pixel_distance: float | None = None

    def is_same(self, limits: Limits) -> bool:
        """Returns whether the pixel check finds the sample itself."""
        if self.hash_bits is None or self.pixel_distance is None:
            return False
        return self.hash_bits <= limits.radius and self.pixel_distance <= MAX_PIXEL_DISTANCE

    def is_near_duplicate(self, limits: Limits) -> bool:
        """Returns whether CLIP's embeddings are nearly equal."""
        return self.hit.similarity >= limits.threshold

    def row(self) -> dict[str, Any]:
        """Returns a row for JSON."""
        return self.hit.row() | {"hash_bits": self.hash_bits, "pixel_distance": self.pixel_distance}


def compare(sample: Image.Image, hit: Hit, image: Image.Image | None) -> Neighbour:
    """Compares a sample with a training image (None if lost), both RGB and of any size."""
    if image is None:
        return Neighbour(hit)
    one, other = _crop(sample), _crop(image)
    bits = (perceptual_hash(one) ^ perceptual_hash(other)) & (2**64 - 1)
    difference = (np.asarray(one, np.float64) - np.asarray(other, np.float64)) / 255
    return Neighbour(hit, bits.bit_count(), round(float(np.sqrt(np.mean(difference**2))), 4))


def _crop(image: Image.Image) -> Image.Image:
    return ImageOps.fit(image, (_COMPARED_PX, _COMPARED_PX), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Calibration:
    """Cosines among some evenly chosen kept images.

    `nearest` are of each with its nearest other kept image; `pairs` of all chosen pairs, which are random.
    """

    threshold: float
    nearest: Sequence[float]
    pairs: Sequence[float]

    def share(self, cosines: Sequence[float]) -> float | None:
        """Returns the share that reaches the limit; None for no cosines."""
        return round(float(np.mean(np.asarray(cosines) >= self.threshold)), 6) if len(cosines) else None

    def summary(self) -> dict[str, Any]:
        """Returns a summary for JSON."""
        return {
            "num_images": len(self.nearest),
            "nearest_other": quantiles(self.nearest),
            "nearest_other_flagged": self.share(self.nearest),
            "num_pairs": len(self.pairs),
            "pairs_by_chance": quantiles(self.pairs),
            "pairs_by_chance_flagged": self.share(self.pairs),
        }

    def sentence(self) -> str:
        """Explains the limit's meaning in this dataset."""
        near, pairs = self.share(self.nearest), self.share(self.pairs)
        if near is None or pairs is None:
            return "There are too few kept images to say what the limit means here."
        return (
            f"Of {len(self.nearest):,} training images, {near:.1%} have another one at {self.threshold:g} or nearer, "
            f"and of {len(self.pairs):,} pairs by chance {pairs:.2%} are: that many are flagged without any copying."
        )


def calibrate(search: Search, threshold: float) -> Calibration:
    """Measures what a limit flags among the training images themselves."""
    vectors = search.some_vectors(_NUM_CALIBRATED)
    nearest = [hits[1].similarity for hits in search.nearest(vectors, 2, kept_only=True) if len(hits) > 1]
    above = np.triu_indices(len(vectors), 1)
    return Calibration(threshold, nearest, (vectors @ vectors.T)[above].tolist())


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Maps shares of the values to the value that each share does not exceed."""
    if not len(values):
        return {}
    found = np.quantile(np.asarray(values, np.float64), _QUANTILES).tolist()
    return {f"{share:.0%}": round(value, 4) for share, value in zip(_QUANTILES, found, strict=True)}
