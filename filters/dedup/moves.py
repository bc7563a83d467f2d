"""Recognizes an image that shows most of another one: moved to where they match best, nearly all pixels agree.

Those that do not are scattered. Where several together differ, as a face or a text does in the same frame, the content
is another. Images of one template match nearly where they lie, and there hardly any difference is a copy's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from filters.dedup.alignment import Mask, Placement, Values, align, move
from filters.dedup.measures import FloatPlanes, chroma_difference, equal_detail, share, slopes, smooth, worst

# Where one image lies on the other: levels of tolerance, and per level of slope; smoothed, and exact.
_LEVELS, _SLOPE_SHARE = 4.0, 0.2
_EXACT_LEVELS, _EXACT_SLOPE_SHARE = 2.0, 0.1
# Its edges, of this slope and more, agree as well; a share of the pixels are edges, and details match.
_EDGE_SLOPE, _EDGE_AGREEMENT, _LEAST_EDGES, _LEAST_DETAIL = 4.0, 0.88, 0.02, 0.6
_LEAST_OVERLAP, _MAX_BOTH_WAYS = 0.7, 0.05
_CHROMA_LEVELS, _CHROMA_LEVELS_FAR, _CHROMA_AGREEMENT = 10.0, 14.0, 0.9
# The most that 3 x 3 neighbours together may differ, in tolerances squared: of images moved by half a pixel and more,
# of those that lie still, and for each half side between.
_MAX_WORST, _MAX_WORST_STILL, _MAX_WORST_SLOPE, _FAR = 4.0, 1.5, 80.0, 0.034
# Of images whose hashes are near: exact and smoothed as they lie, and moved; so many levels are within the first.
_MAX_WORST_ALIKE, _STILL_LEVELS = (4.0, 0.3, 2.4), 4.0


def are_moved(one: FloatPlanes, other: FloatPlanes, agreement: float) -> NDArray[np.bool_]:
    """Returns (P,): whether a share `agreement` of the pixels of aligned pairs agree, on edges too, and all around."""
    moved = np.zeros(len(one.luma), bool)
    placement, rows = align(one.luma, other.luma)
    placed = _place(one.luma[rows], other.luma[rows], placement)
    found = np.flatnonzero(_agree(placed, agreement))
    rows, placement, placed = rows[found], placement.chosen(found), placed.chosen(found)
    colors = chroma_difference(one.chroma[rows], other.chroma[rows], placement, _CHROMA_AGREEMENT)
    is_far = placement.distance() >= _FAR
    moved[rows] = _agree_everywhere(placed, placement.distance()) & (
        colors <= np.where(is_far, _CHROMA_LEVELS_FAR, _CHROMA_LEVELS)
    )
    return moved


def may_be_moved(one: FloatPlanes, other: FloatPlanes) -> NDArray[np.bool_]:
    """Returns (P,): whether pairs, aligned or as they lie, nowhere differ as another content does."""
    may_be = np.zeros(len(one.luma), bool)
    placement, rows = align(one.luma, other.luma)
    placed = _place(one.luma[rows], other.luma[rows], placement)
    still = _place(one.luma[rows], other.luma[rows], placement.at_rest())
    colors = chroma_difference(one.chroma[rows], other.chroma[rows], placement, _CHROMA_AGREEMENT)
    alike = _agree_everywhere(placed, placement.distance(), _MAX_WORST_ALIKE[2]) & (colors <= _CHROMA_LEVELS_FAR)
    may_be[rows] = alike | _hardly_differ(*still)
    return may_be


def are_still(one: Values, other: Values) -> NDArray[np.bool_]:
    """Returns (P,): whether pairs are about equal as they lie, but for their brightness; saves the alignment."""
    difference = other - one
    difference -= np.median(difference, axis=(1, 2), keepdims=True)
    small: NDArray[np.bool_] = np.abs(difference).max(axis=(1, 2)) <= _STILL_LEVELS
    return small


def _hardly_differ(one: Values, other: Values, known: Mask) -> NDArray[np.bool_]:
    """Returns (P,): whether neighbours differ no more, exactly or smoothed, than those of a strongly resized copy."""
    exact = _worst(one, other, known, _EXACT_LEVELS, _EXACT_SLOPE_SHARE)
    smoothed = _worst(smooth(one), smooth(other), known, _LEVELS, _SLOPE_SHARE)
    hardly: NDArray[np.bool_] = (exact <= _MAX_WORST_ALIKE[0]) | (smoothed <= _MAX_WORST_ALIKE[1])
    return hardly


class _Placed(NamedTuple):
    """Brightness of P pairs, one lying on the other, and which pixels both show: (P, S, S) each."""

    one: Values
    other: Values
    known: Mask

    def chosen(self, rows: NDArray[np.intp]) -> _Placed:
        return _Placed(self.one[rows], self.other[rows], self.known[rows])


def _place(one: Values, other: Values, placement: Placement) -> _Placed:
    moved, known = move(one, placement, smooth=True)
    return _Placed(placement.lit(moved), other, known)


def _agree(placed: _Placed, agreement: float) -> NDArray[np.bool_]:
    one, other, known = smooth(placed.one), smooth(placed.other), placed.known
    slope = np.maximum(slopes(one), slopes(other))
    difference, tolerance = other - one, _LEVELS + _SLOPE_SHARE * slope
    brighter, darker = share(difference > tolerance, known), share(difference < -tolerance, known)
    edges = known & (slope > _EDGE_SLOPE)
    agree: NDArray[np.bool_] = (
        (known.mean(axis=(1, 2)) >= _LEAST_OVERLAP)
        & (1 - brighter - darker >= agreement)
        & (np.minimum(brighter, darker) <= _MAX_BOTH_WAYS)
        & (share(edges, known) >= _LEAST_EDGES)
        & (share(np.abs(difference) <= tolerance, edges) >= _EDGE_AGREEMENT)
        & (equal_detail(one, other, known) >= _LEAST_DETAIL)
    )
    return agree


def _agree_everywhere(placed: _Placed, distance: Values, most: float = _MAX_WORST) -> NDArray[np.bool_]:
    """Returns (P,): whether no neighbours differ together, for pairs moved so far, (P,), in half sides.

    The nearer an image lies to where it is, the less its pixels are interpolated, and the more must they be equal.
    """
    one, other, known = placed
    exact = _worst(one, other, known, _EXACT_LEVELS, _EXACT_SLOPE_SHARE)
    moved = _worst(smooth(one), smooth(other), known, _LEVELS, _SLOPE_SHARE)
    equal: NDArray[np.bool_] = np.where(
        distance < _FAR, exact <= _MAX_WORST_STILL + _MAX_WORST_SLOPE * distance, moved <= most
    )
    return equal


def _worst(one: Values, other: Values, known: Mask, levels: float, slope_share: float) -> Values:
    tolerance = (levels + slope_share * np.maximum(slopes(one), slopes(other))).astype(np.float32)
    return worst((one - other) * known, tolerance)
