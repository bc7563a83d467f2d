"""Measures of how far aligned planes of pixels differ: shares, correlations, slopes, details."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from filters.dedup.alignment import Mask, Placement, Values, band, gradients, move
from sdtrain.images.miniature import CHROMA_SIDE

# Added to variances, so that the noise of compression is no detail (levels squared).
_DETAIL_NOISE = 2.0
_DETAIL_PX = 7


class FloatPlanes(NamedTuple):
    """The planes of P miniatures, as `sdtrain.images.miniature.Planes`."""

    luma: Values
    chroma: Values
    dark: Values
    bright: Values

    def chosen(self, rows: NDArray[Any]) -> FloatPlanes:
        """Returns some of the miniatures."""
        return FloatPlanes(*(plane[rows] for plane in self))


def share(chosen: Mask, among: Mask) -> Values:
    """Returns (P,): the share of the pixels `among` that are chosen; 0 if there are none."""
    counts = (np.count_nonzero(mask, axis=(1, 2)).astype(np.float32) for mask in (chosen & among, among))
    shares: Values = next(counts) / np.maximum(next(counts), 1)
    return shares


def correlation(ones: Values, others: Values, among: Mask, noise: float) -> Values:
    """Returns (P,): Pearson's correlation of the pixels `among`, with `noise` added to both variances."""
    num = np.maximum(among.sum(axis=(1, 2)), 1).astype(np.float32)
    one, other = (
        (values - ((values * among).sum(axis=(1, 2)) / num)[:, None, None]) * among for values in (ones, others)
    )
    products = [(a * b).sum(axis=(1, 2)) / num for a, b in ((one, other), (one, one), (other, other))]
    correlations: Values = products[0] / np.sqrt((products[1] + noise) * (products[2] + noise))
    return correlations


def equal_detail(ones: Values, others: Values, among: Mask) -> Values:
    """Returns (P,): correlation, among some pixels, of what remains of them without their surroundings."""
    return correlation(detail(ones, _DETAIL_PX), detail(others, _DETAIL_PX), among, _DETAIL_NOISE)


def local_differences(differences: Values, tolerance: Values) -> Values:
    """Returns (P, S, S): the mean square differences of 3 x 3 neighbours, in those of their tolerances."""
    kernel = band(differences.shape[1], (1 / 3,) * 3)
    means = (kernel @ values**2 @ kernel.T for values in (differences, tolerance))
    return np.asarray(next(means) / next(means), np.float32)


def chroma_difference(one: Values, other: Values, placement: Placement, among: float) -> Values:
    """Returns (P,): the largest difference of the colours (P, 2, S, S) at a share of the cells."""
    largest = np.zeros((len(one), *one.shape[2:]), np.float32)
    for channel in range(one.shape[1]):
        moved, known = move(np.ascontiguousarray(one[:, channel]), placement, cubic=False)
        largest = np.maximum(largest, np.abs(other[:, channel] - moved) * known)
    in_order = np.sort(largest.reshape(-1, CHROMA_SIDE**2), axis=1)
    at: Values = in_order[:, int(among * in_order.shape[1])]
    return at


def slopes(planes: Values) -> Values:
    """Returns the lengths of the gradients, in levels per pixel."""
    lengths: Values = np.hypot(*gradients(planes))
    return lengths


def detail(planes: Values, width: int) -> Values:
    """Takes the mean of the surrounding `width` x `width` pixels off each pixel."""
    kernel = band(planes.shape[1], (1 / width,) * width)
    return np.asarray(planes - kernel @ planes @ kernel.T, np.float32)
