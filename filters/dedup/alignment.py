"""Aligns small planes of pixels of two images, one of which may show a part of the other."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]
Mask = NDArray[np.bool_]

# Shift in half sides, and change of scale: a crop by 15 % at a corner.
_MAX_CHANGE = 0.16
_MAX_GAIN, _MAX_OFFSET = 4 / 3, 30.0
_OUTLIER_LEVELS = 12.0
_DAMPING = 1e-2
_MAX_MISFIT, _OUTLIER_CAP = 10.0, 20.0  # levels: 99 of 100 copies cropped by 5 % have 9.9
_COARSE_STEPS, _FINE_STEPS = 6, 4


class Placement(NamedTuple):
    """How P planes lie on others, and how their brightness differs.

    Attributes:
        scale: change of scale across and down, (P, 2); 0 for none.
        shift: across and down in half sides, (P, 2).
        gain: factor of brightness, (P,).
        offset: what is added to it, (P,).
    """

    scale: Values
    shift: Values
    gain: Values
    offset: Values

    def lit(self, planes: Values) -> Values:
        """Applies the change of brightness."""
        return planes * self.gain[:, None, None] + self.offset[:, None, None]

    def chosen(self, rows: NDArray[np.intp]) -> Placement:
        """Returns some of the placements."""
        return Placement(*(values[rows] for values in self))

    def at_rest(self) -> Placement:
        """Returns the same change of brightness without the move."""
        return self._replace(scale=np.zeros_like(self.scale), shift=np.zeros_like(self.shift))

    def distance(self) -> Values:
        """Returns (P,): the farthest that an edge moves, in half sides."""
        farthest: Values = (np.abs(self.scale) + np.abs(self.shift)).max(axis=1)
        return farthest

    def is_found(self) -> Mask:
        """Returns (P,): whether no move is the largest that is tried."""
        largest: Values = np.maximum(np.abs(self.scale), np.abs(self.shift)).max(axis=1)
        return largest < _MAX_CHANGE

    def beyond(self) -> Values:
        """Returns (P,): how far the inner image reaches beyond the outer one, in half sides; below 0 if nowhere."""
        reach = np.abs(self.shift)[None] + self.scale * np.array([1, -1])[:, None, None]
        farthest: Values = reach.max(axis=2).min(axis=0)
        return farthest


def unmoved(num: int) -> Placement:
    """Returns the placement of planes that lie on the others as they are."""
    still = np.zeros((num, 2), np.float32)
    return Placement(still, still, np.ones(num, np.float32), np.zeros(num, np.float32))


def move(planes: Values, placement: Placement, cubic: bool) -> tuple[Values, Mask]:
    """Returns planes (P, S, S) as the others show them, and which pixels these are; beyond the edge there are none.

    Interpolation is cubic (Keys 1981, a = -1/2) if `cubic`, else linear.
    """
    side = planes.shape[1]
    across, known_across = _samples(side, placement.scale[:, 0], placement.shift[:, 0], cubic)
    down, known_down = _samples(side, placement.scale[:, 1], placement.shift[:, 1], cubic)
    moved = down @ planes @ across.transpose(0, 2, 1)
    return np.asarray(moved, np.float32), known_down[:, :, None] & known_across[:, None, :]


def align(planes: Values, others: Values) -> tuple[Placement, NDArray[np.intp]]:
    """Returns how planes (P, S, S) best lie on others: least squares in which outliers, such as a text, hardly count.

    Gauss-Newton steps for scale, shift, gain and offset (Lucas and Kanade 1981) with Geman and McClure's weights, first
    at half the resolution. Planes that do not fit even there are left out: the second result says which are not.

    The fine steps see smoothed planes: interpolation blurs, most at half a pixel, and would draw fine details there.
    """
    placement = unmoved(len(planes))
    halves = _halved(planes), _halved(others)
    for _ in range(_COARSE_STEPS):
        placement = _step(*halves, placement)
    fits = np.flatnonzero(_misfit(*halves, placement) <= _MAX_MISFIT)
    placement = placement.chosen(fits)
    smoothed = smooth(planes[fits]), smooth(others[fits])
    for _ in range(_FINE_STEPS):
        placement = _step(*smoothed, placement, cubic=True)
    return placement, fits


def smooth(planes: Values) -> Values:
    """Returns means weighted by 1, 2, 1 across and down."""
    kernel = band(planes.shape[1], (0.25, 0.5, 0.25))
    return np.asarray(kernel @ planes @ kernel.T, np.float32)


def _misfit(planes: Values, others: Values, placement: Placement) -> Values:
    """Returns (P,): the mean difference in levels, none counted above `_OUTLIER_CAP`."""
    moved, known = move(planes, placement, cubic=False)
    differences = np.minimum(np.abs(others - placement.lit(moved)), _OUTLIER_CAP) * known
    means: Values = differences.sum(axis=(1, 2)) / np.maximum(known.sum(axis=(1, 2)), 1).astype(np.float32)
    return means


def gradients(planes: Values) -> tuple[Values, Values]:
    """Returns the differences per pixel across and down; 0 at the edges."""
    across, down = np.zeros_like(planes), np.zeros_like(planes)
    across[:, :, 1:-1] = (planes[:, :, 2:] - planes[:, :, :-2]) / 2
    down[:, 1:-1] = (planes[:, 2:] - planes[:, :-2]) / 2
    return across, down


def _step(planes: Values, others: Values, placement: Placement, cubic: bool = False) -> Placement:
    num, side, _ = planes.shape
    moved, known = move(planes, placement, cubic)
    across, down = (slope * (side / 2) for slope in gradients(moved))
    places = _places(side)
    residuals = (others - placement.lit(moved)).reshape(num, side * side, 1)
    by = np.stack(
        [across * places, down * places[:, None], across, down, moved / 64, np.ones_like(moved)], axis=-1
    ).reshape(num, side * side, 6)
    weights = known.reshape(num, side * side, 1) / (1 + (residuals / _OUTLIER_LEVELS) ** 2) ** 2
    weighted = (by * weights).transpose(0, 2, 1)
    normal = weighted @ by
    mean_curvature = np.trace(normal[:, :4, :4], axis1=1, axis2=2) / 4
    damping = np.concatenate([np.repeat(mean_curvature[:, None] * _DAMPING, 4, axis=1), np.zeros((num, 2))], axis=1)
    normal[:, range(6), range(6)] += damping + 1e-3
    change = np.linalg.solve(normal, weighted @ residuals)[..., 0].astype(np.float32)
    gain = placement.gain[:, None]
    return Placement(
        (placement.scale + change[:, :2] / gain).clip(-_MAX_CHANGE, _MAX_CHANGE),
        (placement.shift + change[:, 2:4] / gain).clip(-_MAX_CHANGE, _MAX_CHANGE),
        (placement.gain + change[:, 4] / 64).clip(1 / _MAX_GAIN, _MAX_GAIN),
        (placement.offset + change[:, 5]).clip(-_MAX_OFFSET, _MAX_OFFSET),
    )


def _samples(side: int, scale: Values, shift: Values, cubic: bool) -> tuple[Values, Mask]:
    """Returns (P, S, S), which samples lines of S pixels at S other points, and (P, S), which of these are on them."""
    points = np.asarray((_places(side) * (1 + scale[:, None]) + shift[:, None] + 1) / 2 * side - 0.5, np.float32)
    known = (points >= -0.5) & (points <= side - 0.5)
    away = np.abs(points.clip(0, side - 1)[:, :, None] - np.arange(side, dtype=np.float32))
    if not cubic:
        return np.maximum(0, 1 - away), known
    near = (1.5 * away - 2.5) * away**2 + 1
    far = ((-0.5 * away + 2.5) * away - 4) * away + 2
    weights = np.where(away <= 1, near, np.where(away < 2, far, 0))
    return weights / weights.sum(axis=2, keepdims=True), known


def _places(side: int) -> Values:
    return ((np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1).astype(np.float32)


def _halved(planes: Values) -> Values:
    num, side, _ = planes.shape
    halved: Values = planes.reshape(num, side // 2, 2, side // 2, 2).mean(axis=(2, 4))
    return halved


@lru_cache
def band(side: int, kernel: tuple[float, ...]) -> Values:
    """Returns the matrix that convolves a line of `side` pixels, reflected at its ends."""
    matrix, reach = np.zeros((side, side), np.float32), len(kernel) // 2
    for row in range(side):
        for step, weight in enumerate(kernel):
            at = abs(row + step - reach)
            matrix[row, min(at, 2 * (side - 1) - at)] += weight
    return matrix
