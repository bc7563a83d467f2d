"""Compares miniatures of two images: whether one is an altered copy of the other.

One miniature is laid on the other. As they lie, they are copies if the darkest pixels of nearly all cells are equal
(nothing but a bright text on top), or the brightest ones; moved to where they match best, if nearly all pixels are, on
edges too. The limits were measured on planted copies and hard negatives (docs/LOG.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from filters.dedup.alignment import Mask, Placement, Values, align, gradients, move, unmoved
from sdtrain.images.miniature import CHROMA_SIDE, Planes

# A pair is compared where one image lies on the other after this many levels of tolerance, and per level of slope.
_LEVELS, _SLOPE_SHARE = 4.0, 0.2
_EXTREME_LEVELS, _EXTREME_SLOPE_SHARE = 6.0, 0.15
_CHROMA_LEVELS, _CHROMA_AGREEMENT = (7.0, 10.0), 0.9
# Mean differences beyond which nothing else is compared: 99 of 100 copies cropped anywhere by 5 % have 5.2 and 8.0.
_MAX_CHROMA_MEAN, _MAX_LUMA_MEAN = 7.0, 8.0
# A moved copy: its edges, of this slope and more, agree as well; a share of the pixels are edges, and details match.
_EDGE_SLOPE, _EDGE_AGREEMENT, _LEAST_EDGES, _LEAST_DETAIL = 4.0, 0.88, 0.02, 0.6
_LEAST_OVERLAP, _MAX_BOTH_WAYS = 0.7, 0.05
# An overlaid copy: what is not equal is nearly always brighter, or nearly always darker, and is no more than half.
_OVERLAY_BOTH_WAYS, _OVERLAY_AGREEMENT = 0.003, 0.5
# Added to variances, so that the noise of compression is no detail (levels squared).
_DETAIL_NOISE, _EXTREME_NOISE = 2.0, 10.0


@dataclass(frozen=True)
class Limits:
    """What two miniatures must have in common.

    Attributes:
        agreement: the least share of pixels that agree where one image lies on the other.
        overlaid_agreement: the same of the cells' darkest or brightest pixels, under an overlay.
    """

    agreement: float
    overlaid_agreement: float


def are_copies(ones: Planes, others: Planes, mirrored: NDArray[np.bool_], limits: Limits) -> NDArray[np.bool_]:
    """Returns (P,): whether miniatures are of altered copies, after mirroring `ones` where `mirrored`."""
    copies = np.zeros(len(mirrored), bool)
    one, other = (_Floats(*(plane.astype(np.float32) for plane in planes)) for planes in (ones, others))
    one = _Floats(*(np.where(_beside(mirrored, plane), plane[..., ::-1], plane) for plane in one))
    left = np.flatnonzero(_may_be_copies(one, other))
    one, other = one.chosen(left), other.chosen(left)
    copies[left] = overlaid = _are_overlaid(_compare(one, other, unmoved(len(left))), limits)
    left, one, other = left[~overlaid], one.chosen(~overlaid), other.chosen(~overlaid)
    placement, fits = align(one.luma, other.luma)
    left, one, other = left[fits], one.chosen(fits), other.chosen(fits)
    copies[left] = _are_moved(_compare(one, other, placement), limits)
    return copies


def _may_be_copies(one: _Floats, other: _Floats) -> NDArray[np.bool_]:
    """Returns (P,): whether colours, and brightness in large cells, are about the same; saves most of the time."""
    chroma = np.abs(one.chroma - other.chroma).max(axis=1).mean(axis=(1, 2))
    pairs = ((one.luma, other.luma), (one.dark, other.dark), (one.bright, other.bright))
    luma = np.min([np.abs(_large_cells(a) - _large_cells(b)).mean(axis=(1, 2)) for a, b in pairs], axis=0)
    may_be: NDArray[np.bool_] = (chroma <= _MAX_CHROMA_MEAN) & (luma <= _MAX_LUMA_MEAN)
    return may_be


def _large_cells(planes: Values) -> Values:
    """Returns (P, 4, 4): means without their median."""
    num, side, _ = planes.shape
    cells: Values = planes.reshape(num, 4, side // 4, 4, side // 4).mean(axis=(2, 4))
    return cells - np.median(cells, axis=(1, 2), keepdims=True)


class _Floats(NamedTuple):
    luma: Values
    chroma: Values
    dark: Values
    bright: Values

    def chosen(self, rows: NDArray[Any]) -> _Floats:
        return _Floats(*(plane[rows] for plane in self))


class _Comparison(NamedTuple):
    """Where P aligned pairs agree; all are shares of the pixels that both show, or correlations.

    Attributes:
        overlap: the share of the other image that the first shows.
        agreement: the pixels that agree.
        both_ways: the pixels that are brighter, or darker if these are fewer.
        edge_agreement: the pixels on edges that agree, among those on edges.
        edges: the pixels on edges.
        detail: correlation of what remains of the pixels without their surroundings.
        equal_detail: the same among pixels that agree.
        dark: the darkest pixels that agree, and the correlation of their details.
        bright: the brightest ones, likewise.
        chroma: largest difference of the colours at nine tenths of the cells.
    """

    overlap: Values
    agreement: Values
    both_ways: Values
    edge_agreement: Values
    edges: Values
    detail: Values
    equal_detail: Values
    dark: tuple[Values, Values]
    bright: tuple[Values, Values]
    chroma: Values


def _are_overlaid(found: _Comparison, limits: Limits) -> NDArray[np.bool_]:
    """Returns (P,): whether pairs are equal as they lie but for a text that is brighter, or darker, than the image."""
    extremes = [
        (agreement >= limits.overlaid_agreement) & (detail >= _LEAST_DETAIL)
        for agreement, detail in (found.dark, found.bright)
    ]
    overlaid: NDArray[np.bool_] = (
        (extremes[0] | extremes[1])
        & (found.both_ways <= _OVERLAY_BOTH_WAYS)
        & (found.agreement >= _OVERLAY_AGREEMENT)
        & (found.equal_detail >= _LEAST_DETAIL)
        & (found.chroma <= _CHROMA_LEVELS[0])
    )
    return overlaid


def _are_moved(found: _Comparison, limits: Limits) -> NDArray[np.bool_]:
    """Returns (P,): whether nearly all pixels of the aligned pairs agree, on edges too."""
    moved: NDArray[np.bool_] = (
        (found.overlap >= _LEAST_OVERLAP)
        & (found.agreement >= limits.agreement)
        & (found.both_ways <= _MAX_BOTH_WAYS)
        & (found.edges >= _LEAST_EDGES)
        & (found.edge_agreement >= _EDGE_AGREEMENT)
        & (found.detail >= _LEAST_DETAIL)
        & (found.chroma <= _CHROMA_LEVELS[1])
    )
    return moved


def _compare(one: _Floats, other: _Floats, placement: Placement) -> _Comparison:
    moved, known = move(one.luma, placement, smooth=True)
    lit, target = _smooth(placement.lit(moved)), _smooth(other.luma)
    slopes = np.maximum(_slopes(lit), _slopes(target))
    difference, tolerance = target - lit, _LEVELS + _SLOPE_SHARE * slopes
    brighter, darker = _share((difference > tolerance), known), _share((difference < -tolerance), known)
    equal, edges = known & (np.abs(difference) <= tolerance), known & (slopes > _EDGE_SLOPE)
    details = _detail(lit, 7), _detail(target, 7)
    return _Comparison(
        overlap=known.mean(axis=(1, 2), dtype=np.float32),
        agreement=1 - brighter - darker,
        both_ways=np.minimum(brighter, darker),
        edge_agreement=_share(equal, edges),
        edges=_share(edges, known),
        detail=_correlation(*details, known, _DETAIL_NOISE),
        equal_detail=_correlation(*details, equal, _DETAIL_NOISE),
        dark=_compare_extremes(one.dark, other.dark, placement),
        bright=_compare_extremes(one.bright, other.bright, placement),
        chroma=_chroma_difference(one.chroma, other.chroma, placement),
    )


def _compare_extremes(one: Values, other: Values, placement: Placement) -> tuple[Values, Values]:
    moved, known = move(one, placement, smooth=False)
    lit = placement.lit(moved)
    tolerance = _EXTREME_LEVELS + _EXTREME_SLOPE_SHARE * np.maximum(_slopes(lit), _slopes(other))
    details = _correlation(_detail(lit, 5), _detail(other, 5), known, _EXTREME_NOISE)
    return _share(np.abs(other - lit) <= tolerance, known), details


def _chroma_difference(one: Values, other: Values, placement: Placement) -> Values:
    largest = np.zeros((len(one), *one.shape[2:]), np.float32)
    for channel in range(one.shape[1]):
        moved, known = move(np.ascontiguousarray(one[:, channel]), placement, smooth=False)
        largest = np.maximum(largest, np.abs(other[:, channel] - moved) * known)
    in_order = np.sort(largest.reshape(-1, CHROMA_SIDE**2), axis=1)
    at: Values = in_order[:, int(_CHROMA_AGREEMENT * in_order.shape[1])]
    return at


def _share(chosen: Mask, among: Mask) -> Values:
    """Returns (P,): the share of the pixels `among` that are chosen; 0 if there are none."""
    counts = (mask.sum(axis=(1, 2)).astype(np.float32) for mask in (chosen & among, among))
    shares: Values = next(counts) / np.maximum(next(counts), 1)
    return shares


def _correlation(ones: Values, others: Values, among: Mask, noise: float) -> Values:
    """Returns (P,): Pearson's correlation of the pixels `among`, with `noise` added to both variances."""
    num = np.maximum(among.sum(axis=(1, 2)), 1).astype(np.float32)
    one, other = (
        (values - ((values * among).sum(axis=(1, 2)) / num)[:, None, None]) * among for values in (ones, others)
    )
    products = [(a * b).sum(axis=(1, 2)) / num for a, b in ((one, other), (one, one), (other, other))]
    correlations: Values = products[0] / np.sqrt((products[1] + noise) * (products[2] + noise))
    return correlations


def _slopes(planes: Values) -> Values:
    slopes: Values = np.hypot(*gradients(planes))
    return slopes


def _smooth(planes: Values) -> Values:
    kernel = _band(planes.shape[1], (0.25, 0.5, 0.25))
    return np.asarray(kernel @ planes @ kernel.T, np.float32)


def _detail(planes: Values, width: int) -> Values:
    """Takes the mean of the surrounding `width` x `width` pixels off each pixel."""
    kernel = _band(planes.shape[1], (1 / width,) * width)
    return np.asarray(planes - kernel @ planes @ kernel.T, np.float32)


@lru_cache
def _band(side: int, kernel: tuple[float, ...]) -> Values:
    """Returns the matrix that convolves a line of `side` pixels, reflected at its ends."""
    matrix, reach = np.zeros((side, side), np.float32), len(kernel) // 2
    for row in range(side):
        for step, weight in enumerate(kernel):
            at = abs(row + step - reach)
            matrix[row, min(at, 2 * (side - 1) - at)] += weight
    return matrix


def _beside(chosen: NDArray[np.bool_], plane: Values) -> NDArray[np.bool_]:
    return chosen.reshape(-1, *[1] * (plane.ndim - 1))
