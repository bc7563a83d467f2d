"""Recognizes an image with a mark laid over it: what differs is brighter only, or darker only, and little is covered.

Other content in the same frame, such as another title on a template, differs both ways: each image has pixels of its
own where the other's are paper. In a corner it may, as a logo of two colours does, where all else is equal.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from filters.dedup.alignment import Values, unmoved
from filters.dedup.measures import (
    FloatPlanes,
    chroma_difference,
    correlation,
    detail,
    equal_detail,
    local_differences,
    share,
    slopes,
)

# What is touched, in levels of brightness and per level of slope.
_TOUCHED_LEVELS, _TOUCHED_SLOPE_SHARE = 3.0, 0.1
# Pixels that differ the other way, and their share of the energy, to which compression adds noise.
_OTHER_WAY_PIXELS, _OTHER_WAY_ENERGY, _ENERGY_NOISE = 2, 0.004, 20.0
# Least shares that are untouched: of all pixels, and of either image's edges, which have this slope and more.
_LEAST_UNTOUCHED, _LEAST_UNTOUCHED_EDGES, _EDGE_SLOPE = 0.5, 0.45, 4.0
_LEAST_DETAIL = 0.6
_CHROMA_LEVELS, _CHROMA_AGREEMENT = 7.0, 0.9
# Darkest and brightest pixels also change with a resizing, by a share of the cell's contrast.
_EXTREME_LEVELS, _EXTREME_SLOPE_SHARE, _EXTREME_CONTRAST_SHARE = 14.0, 0.2, 0.3
_EXTREME_NOISE, _EXTREME_DETAIL_PX = 10.0, 5  # levels squared
# A mark in a corner, of any brightness, is within so many pixels. All else is equal, in tolerances squared, and has
# edges.
_CORNER_PX, _CORNER_LEVELS, _MAX_ELSEWHERE, _LEAST_EDGES = 9, 2.0, 1.0, 0.1
_ENDS = slice(_CORNER_PX), slice(-_CORNER_PX, None)


def are_overlaid(one: FloatPlanes, other: FloatPlanes, agreement: float) -> NDArray[np.bool_]:
    """Returns (P,): whether pairs are equal as they lie but for a mark that is brighter, or darker, than the image.

    `agreement` is the least share of cells whose darkest pixels, or whose brightest ones, are equal.
    """
    overlaid = _differ_one_way(one.luma, other.luma)
    rows = np.flatnonzero(overlaid)
    one_way = one.chosen(rows), other.chosen(rows)
    overlaid[rows] = _are_equal_elsewhere(*one_way) & _have_equal_extremes(*one_way, agreement)
    rows = np.flatnonzero(~overlaid)
    overlaid[rows] = _are_marked_in_a_corner(one.chosen(rows), other.chosen(rows))
    return overlaid


def _are_marked_in_a_corner(one: FloatPlanes, other: FloatPlanes) -> NDArray[np.bool_]:
    slope = np.maximum(slopes(one.luma), slopes(other.luma))
    tolerance = np.asarray(_CORNER_LEVELS + _TOUCHED_SLOPE_SHARE * slope, np.float32)
    equal = local_differences(other.luma - one.luma, tolerance) <= _MAX_ELSEWHERE
    among = ~np.stack([equal[:, rows, columns] for rows in _ENDS for columns in _ENDS])
    num_different = np.count_nonzero(~equal, axis=(1, 2)) - np.count_nonzero(among, axis=(2, 3)).max(axis=0)
    colors = chroma_difference(one.chroma, other.chroma, unmoved(len(slope)), _CHROMA_AGREEMENT)
    has_edges = (slope > _EDGE_SLOPE).mean(axis=(1, 2)) >= _LEAST_EDGES
    marked: NDArray[np.bool_] = (num_different == 0) & has_edges & (colors <= _CHROMA_LEVELS)
    return marked


def _tolerance(one: Values, other: Values) -> Values:
    return np.asarray(_TOUCHED_LEVELS + _TOUCHED_SLOPE_SHARE * np.maximum(slopes(one), slopes(other)), np.float32)


def _differ_one_way(one: Values, other: Values) -> NDArray[np.bool_]:
    difference, tolerance = other - one, _tolerance(one, other)
    excess = np.maximum(difference - tolerance, 0), np.maximum(-difference - tolerance, 0)
    num = np.minimum(*(np.count_nonzero(values, axis=(1, 2)) for values in excess))
    energies = [np.square(values).sum(axis=(1, 2)) for values in excess]
    other_way = np.minimum(*energies) / (energies[0] + energies[1] + _ENERGY_NOISE)
    one_way: NDArray[np.bool_] = (num <= _OTHER_WAY_PIXELS) & (other_way <= _OTHER_WAY_ENERGY)
    return one_way


def _are_equal_elsewhere(one: FloatPlanes, other: FloatPlanes) -> NDArray[np.bool_]:
    untouched = np.abs(other.luma - one.luma) <= _tolerance(one.luma, other.luma)
    edges = [share(untouched, slopes(plane) > _EDGE_SLOPE) for plane in (one.luma, other.luma)]
    equal: NDArray[np.bool_] = (
        (untouched.mean(axis=(1, 2)) >= _LEAST_UNTOUCHED)
        & (np.minimum(*edges) >= _LEAST_UNTOUCHED_EDGES)
        & (equal_detail(one.luma, other.luma, untouched) >= _LEAST_DETAIL)
        & (chroma_difference(one.chroma, other.chroma, unmoved(len(one.luma)), _CHROMA_AGREEMENT) <= _CHROMA_LEVELS)
    )
    return equal


def _have_equal_extremes(one: FloatPlanes, other: FloatPlanes, agreement: float) -> NDArray[np.bool_]:
    contrast = np.minimum(one.bright - one.dark, other.bright - other.dark)
    equal = np.zeros(len(contrast), bool)
    everywhere = np.ones(contrast.shape, bool)
    for a, b in ((one.dark, other.dark), (one.bright, other.bright)):
        slope = np.maximum(slopes(a), slopes(b))
        tolerance = _EXTREME_LEVELS + _EXTREME_SLOPE_SHARE * slope + _EXTREME_CONTRAST_SHARE * contrast
        one_detail, other_detail = (detail(plane, _EXTREME_DETAIL_PX) for plane in (a, b))
        alike = correlation(one_detail, other_detail, everywhere, _EXTREME_NOISE) >= _LEAST_DETAIL
        equal |= alike & (share(np.abs(b - a) <= tolerance, everywhere) >= agreement)
    return equal
