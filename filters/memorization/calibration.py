"""What a limit for cosines means for a dataset, measured on its own images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from filters.search.search import Search

_NUM_PICTURES = 256
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Calibration:
    """Cosines among some kept images, evenly chosen.

    Attributes:
        threshold: the limit.
        nearest: of each with its nearest other image of all that were kept.
        pairs: of all pairs of the chosen, which are two images by chance and show different things.
    """

    threshold: float
    nearest: Sequence[float]
    pairs: Sequence[float]

    def share(self, cosines: Sequence[float]) -> float | None:
        """Which share of them reaches the limit; None of none."""
        return round(float(np.mean(np.asarray(cosines) >= self.threshold)), 6) if len(cosines) else None

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "num_pictures": len(self.nearest),
            "nearest_other": quantiles(self.nearest),
            "nearest_other_flagged": self.share(self.nearest),
            "num_pairs": len(self.pairs),
            "pairs_by_chance": quantiles(self.pairs),
            "pairs_by_chance_flagged": self.share(self.pairs),
        }

    def sentence(self) -> str:
        """What one must know to read the limit."""
        near, pairs = self.share(self.nearest), self.share(self.pairs)
        if near is None or pairs is None:
            return "There are too few kept images to say what the limit means here."
        return (
            f"Of {len(self.nearest):,} training images, {near:.1%} have another one at {self.threshold:g} or nearer, "
            f"and of {len(self.pairs):,} pairs by chance {pairs:.2%} are: that many are flagged without any copying."
        )


def calibrate(search: Search, threshold: float) -> Calibration:
    """Measures what a limit flags among training images themselves."""
    vectors = search.some_vectors(_NUM_PICTURES)
    nearest = [hits[1].nearness for hits in search.nearest(vectors, 2, kept_only=True) if len(hits) > 1]
    above = np.triu_indices(len(vectors), 1)
    return Calibration(threshold, nearest, (vectors @ vectors.T)[above].tolist())


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Share of the values -> the value that this share does not exceed."""
    if not len(values):
        return {}
    found = np.quantile(np.asarray(values, np.float64), _QUANTILES).tolist()
    return {f"{share:.0%}": round(value, 4) for share, value in zip(_QUANTILES, found, strict=True)}
