"""Recognizes an image that shows most of another one: moved to where they match best, nearly all pixels agree.

Those that do not are scattered. Where several together differ, as a face or a text does in the same frame, the content
is another. Images of one template match nearly where they lie, and a move brings them no nearer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from filters.dedup.alignment import Mask, Placement, Values, align, move, smooth
from filters.dedup.measures import FloatPlanes, chroma_difference, equal_detail, local_differences, share, slopes
from filters.dedup.retouches import retouched

# Where one image lies on the other: levels of tolerance, and per level of slope; smoothed, and exact.
_LEVELS, _SLOPE_SHARE = 4.0, 0.2
_EXACT_LEVELS, _EXACT_SLOPE_SHARE = 2.0, 0.1
# Its edges, of this slope and more, agree as well; a share of the pixels are edges, and details match.
_EDGE_SLOPE, _EDGE_AGREEMENT, _LEAST_EDGES, _LEAST_DETAIL = 4.0, 0.88, 0.02, 0.6
_LEAST_OVERLAP, _MAX_BOTH_WAYS = 0.7, 0.05
_CHROMA_LEVELS, _CHROMA_LEVELS_FAR, _CHROMA_AGREEMENT = 10.0, 14.0, 0.9
# The most that 3 x 3 neighbours together may differ, in tolerances squared: where images lie still, and more for each
# half side that they are moved, at most so far.
_MAX_STILL, _MAX_STILL_SLOPE, _FAR = 1.5, 80.0, 0.034
# The same of differences all over the image, as sharpening makes: no more than so many times the median.
_MAX_SCATTERED, _MAX_SCATTERED_SLOPE, _MAX_MEDIANS, _MEDIAN_NOISE = 14.0, 500.0, 60.0, 0.03
# Smoothed, of images that are moved far, if that explains so much of the differences. Of those that are moved as by a
# crop, within these half sides and so that one image lies within the other but for a share of the way.
_MAX_FAR, _MAX_UNEXPLAINED_FAR = 4.0, 0.6
_MAX_CROPPED, _MAX_CROPPED_SLOPE, _MAX_UNEXPLAINED, _CROPPED, _MAX_BEYOND = 6.0, 250.0, 0.92, (0.006, 0.07), 0.25
_ENERGY_NOISE = 0.5  # levels squared
_LEAST_RETOUCHED_EDGES = 0.25
# Of images whose hashes are near: exact and smoothed as they lie, and moved; so many levels are within the first.
_MAX_WORST_ALIKE, _STILL_LEVELS = (4.0, 0.3, 2.4), 4.0


def are_moved(one: FloatPlanes, other: FloatPlanes, agreement: float) -> NDArray[np.bool_]:
    """Returns (P,): whether a share `agreement` of the pixels of aligned pairs agree, on edges too, and all around."""
    moved = np.zeros(len(one.luma), bool)
    placement, rows = align(one.luma, other.luma)
    placed = _place(one.luma[rows], other.luma[rows], placement)
    found = np.flatnonzero(_agree_somehow(placed, placement.distance(), agreement))
    rows, placement, placed = rows[found], placement.chosen(found), placed.chosen(found)
    moved[rows] = _agree_everywhere(one.chosen(rows), other.chosen(rows), placement, placed)
    return moved


def may_be_moved(one: FloatPlanes, other: FloatPlanes, agreement: float) -> NDArray[np.bool_]:
    """Returns (P,): whether pairs, aligned or as they lie, nowhere differ as another content does."""
    may_be = np.zeros(len(one.luma), bool)
    placement, rows = align(one.luma, other.luma)
    placed = _place(one.luma[rows], other.luma[rows], placement)
    still = _place(one.luma[rows], other.luma[rows], placement.at_rest())
    colors = _chroma(one.chosen(rows), other.chosen(rows), placement)
    smoothed = _smoothed(placed).max(axis=(1, 2))
    alike = (placement.distance() >= _FAR) & (smoothed <= _MAX_WORST_ALIKE[2]) & (colors <= _CHROMA_LEVELS_FAR)
    found = alike | _hardly_differ(still) | _agree_somehow(placed, placement.distance(), agreement)
    left = np.flatnonzero(found & ~alike & ~_hardly_differ(still))
    found[left] = _agree_everywhere(
        one.chosen(rows[left]), other.chosen(rows[left]), placement.chosen(left), placed.chosen(left)
    )
    may_be[rows] = found
    return may_be


def are_still(one: Values, other: Values) -> NDArray[np.bool_]:
    """Returns (P,): whether pairs are about equal as they lie, but for their brightness; saves the alignment."""
    difference = other - one
    difference -= np.median(difference, axis=(1, 2), keepdims=True)
    small: NDArray[np.bool_] = np.abs(difference).max(axis=(1, 2)) <= _STILL_LEVELS
    return small


def _hardly_differ(still: _Placed) -> NDArray[np.bool_]:
    """Returns (P,): whether neighbours differ no more, exactly or smoothed, than those of a strongly resized copy."""
    exact, smoothed = (differences.max(axis=(1, 2)) for differences in (_exact(still), _smoothed(still)))
    hardly: NDArray[np.bool_] = (exact <= _MAX_WORST_ALIKE[0]) | (smoothed <= _MAX_WORST_ALIKE[1])
    return hardly


class _Placed(NamedTuple):
    """Brightness of P pairs, one lying on the other, and which pixels both show: (P, S, S) each."""

    one: Values
    other: Values
    known: Mask

    def retouched(self) -> _Placed:
        """Undoes a retouch of the images that have many edges: the outlines of simple ones would follow a curve."""
        slope = np.maximum(slopes(self.one), slopes(self.other))
        rows = np.flatnonzero(share(slope > _EDGE_SLOPE, self.known) >= _LEAST_RETOUCHED_EDGES)
        one = self.one.copy()
        one[rows] = retouched(*self.chosen(rows))
        return self._replace(one=one)

    def chosen(self, rows: NDArray[np.intp]) -> _Placed:
        return _Placed(self.one[rows], self.other[rows], self.known[rows])


def _place(one: Values, other: Values, placement: Placement) -> _Placed:
    moved, known = move(one, placement, cubic=True)
    return _Placed(placement.lit(moved), other, known)


def _agree_somehow(placed: _Placed, distance: Values, agreement: float) -> NDArray[np.bool_]:
    """Returns (P,): whether pairs agree as they are or, if moved by little, after a retouch."""
    agree = _agree(placed, agreement)
    left = np.flatnonzero(~agree & (distance < _CROPPED[1]))
    agree[left] = _agree(placed.chosen(left).retouched(), agreement)
    return agree


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


def _agree_everywhere(one: FloatPlanes, other: FloatPlanes, placement: Placement, placed: _Placed) -> NDArray[np.bool_]:
    """Returns (P,): whether no neighbours differ together as other content does, and colours agree.

    The nearer an image lies to where it is, the less its pixels are interpolated, and the more must they be equal.
    """
    distance, fitted = placement.distance(), placed.retouched()
    exact, smoothed = _exact(fitted), _smoothed(fitted).max(axis=(1, 2))
    worst, medians, is_far = exact.max(axis=(1, 2)), _median(exact), distance >= _FAR
    still = worst <= _MAX_STILL + _MAX_STILL_SLOPE * distance
    scattered = (worst <= _MAX_SCATTERED + _MAX_SCATTERED_SLOPE * distance) & (
        worst <= _MAX_MEDIANS * (medians + _MEDIAN_NOISE)
    )
    at_rest = _place(one.luma, other.luma, placement.at_rest()).retouched()
    unexplained = (_energy(fitted) + _ENERGY_NOISE) / (_energy(at_rest) + _ENERGY_NOISE)
    far = (
        is_far
        & (_smoothed(placed).max(axis=(1, 2)) <= _MAX_FAR)
        & (unexplained <= _MAX_UNEXPLAINED_FAR)
        & placement.is_found()
    )
    cropped = (
        (distance >= _CROPPED[0])
        & (distance < _CROPPED[1])
        & (placement.beyond() <= _MAX_BEYOND * distance)
        & (smoothed <= np.where(is_far, _MAX_FAR, np.minimum(_MAX_CROPPED, _MAX_CROPPED_SLOPE * distance)))
        & (unexplained <= _MAX_UNEXPLAINED)
    )
    most_chroma = np.where(far | cropped, _CHROMA_LEVELS_FAR, _CHROMA_LEVELS)
    equal: NDArray[np.bool_] = (~is_far & (still | scattered) | far | cropped) & (
        _chroma(one, other, placement) <= most_chroma
    )
    return equal


def _chroma(one: FloatPlanes, other: FloatPlanes, placement: Placement) -> Values:
    return chroma_difference(one.chroma, other.chroma, placement, _CHROMA_AGREEMENT)


def _energy(placed: _Placed) -> Values:
    """Returns (P,): the mean square difference."""
    one, other, known = placed
    means: Values = (np.square(one - other) * known).sum(axis=(1, 2)) / np.maximum(known.sum(axis=(1, 2)), 1)
    return means


def _median(planes: Values) -> Values:
    in_order = np.sort(planes.reshape(-1, planes.shape[1] * planes.shape[2]), axis=1)
    return np.asarray(in_order[:, in_order.shape[1] // 2])


def _exact(placed: _Placed) -> Values:
    return _differences(*placed, _EXACT_LEVELS, _EXACT_SLOPE_SHARE)


def _smoothed(placed: _Placed) -> Values:
    return _differences(smooth(placed.one), smooth(placed.other), placed.known, _LEVELS, _SLOPE_SHARE)


def _differences(one: Values, other: Values, known: Mask, levels: float, slope_share: float) -> Values:
    tolerance = (levels + slope_share * np.maximum(slopes(one), slopes(other))).astype(np.float32)
    return local_differences((one - other) * known, tolerance)
