"""Image similarity by pixels, perceptual hashes and embeddings, and calibration of a cosine limit on a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from filters.search.hits import Hit, image_of
from filters.search.search import Search
from sdtrain.images.perceptual_hash import perceptual_hash

if TYPE_CHECKING:
    from filters.score.sscd import SscdEncoder

MAX_PIXEL_DISTANCE = 0.15
_COMPARED_PX = 256
_NUM_CALIBRATED, _NUM_CALIBRATED_SSCD = 256, 64
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Limits:
    """The limits beyond which a sample counts as memorised, and the number of neighbours to compare (`top`).

    `threshold` is the least CLIP cosine to flag; `sscd_threshold`, if given, is that of SSCD, which then decides in
    CLIP's place; `radius` the bits in which perceptual hashes may differ.
    """

    threshold: float = 0.95
    radius: int = 10
    top: int = 4
    sscd_threshold: float | None = None

    @property
    def network(self) -> str:
        """The network whose cosines decide."""
        return "CLIP" if self.sscd_threshold is None else "SSCD"

    @property
    def cosine(self) -> float:
        """Its limit."""
        return self.threshold if self.sscd_threshold is None else self.sscd_threshold


@dataclass(frozen=True)
class Neighbour:
    """A training image near a sample; None for distances and `sscd` if the image is lost.

    Attributes:
        sscd: cosine of SSCD's embeddings; None if SSCD is not asked.
        hash_bits: differing bits of the perceptual hashes.
        pixel_distance: root mean square, of channels from 0 to 1.
    """

    hit: Hit
    hash_bits: int | None = None
    pixel_distance: float | None = None
    sscd: float | None = None

    def is_same(self, limits: Limits) -> bool:
        """Returns whether the pixel check finds the sample itself."""
        if self.hash_bits is None or self.pixel_distance is None:
            return False
        return self.hash_bits <= limits.radius and self.pixel_distance <= MAX_PIXEL_DISTANCE

    def cosine(self, limits: Limits) -> float:
        """Returns the cosine that decides; -1 if it is SSCD's and the image is lost."""
        if limits.sscd_threshold is None:
            return self.hit.similarity
        return -1.0 if self.sscd is None else self.sscd

    def is_near_duplicate(self, limits: Limits) -> bool:
        """Returns whether the embeddings are nearly equal."""
        return self.cosine(limits) >= limits.cosine

    def row(self) -> dict[str, Any]:
        """Returns a row for JSON."""
        distances = {"hash_bits": self.hash_bits, "pixel_distance": self.pixel_distance}
        return self.hit.row() | distances | ({} if self.sscd is None else {"sscd": round(self.sscd, 4)})


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


def calibrate(search: Search, limits: Limits, sscd: SscdEncoder | None = None) -> Calibration:
    """Measures what a limit flags among the training images themselves; with SSCD among fewer, which are read."""
    vectors = search.some_vectors(_NUM_CALIBRATED if sscd is None else _NUM_CALIBRATED_SSCD)
    found = [hits for hits in search.nearest(vectors, 2, kept_only=True) if len(hits) > 1]
    if sscd is None:
        return Calibration(limits.cosine, [hits[1].similarity for hits in found], _pairs(vectors))
    read = [tuple(image_of(search.dataset, hit) for hit in hits) for hits in found]
    known = [(image, other) for image, other in read if image is not None and other is not None]
    ones, others = ([sscd.embed([pair[i]])[0] for pair in known] for i in (0, 1))
    nearest = [float(one @ other) for one, other in zip(ones, others, strict=True)]
    return Calibration(limits.cosine, nearest, _pairs(np.array(ones).reshape(len(ones), -1)))


def _pairs(vectors: NDArray[np.float32]) -> list[float]:
    cosines: list[float] = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)].tolist()
    return cosines


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Maps shares of the values to the value that each share does not exceed."""
    if not len(values):
        return {}
    found = np.quantile(np.asarray(values, np.float64), _QUANTILES).tolist()
    return {f"{share:.0%}": round(value, 4) for share, value in zip(_QUANTILES, found, strict=True)}
