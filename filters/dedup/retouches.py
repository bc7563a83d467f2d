"""Undoes a retouch of a whole image: another curve of brightness, sharper or softer details."""

from __future__ import annotations

import numpy as np

from filters.dedup.alignment import Mask, Values
from filters.dedup.measures import detail

_MIDDLE, _LEVELS, _DETAIL_LEVELS = 128.0, 64.0, 8.0  # so that all terms are about as large
_DETAIL_PX = (3, 5)
_DAMPING = 3.0
_MAX_CHANGE = 10.0  # levels: a curve would make any two objects of one shade equal


def retouched(planes: Values, others: Values, known: Mask) -> Values:
    """Returns planes (P, S, S) with the retouch that brings them nearest to others, by least squares.

    Six terms for all pixels together: a cubic curve of brightness, and what remains without neighbours. Other content,
    which is in one place, they hardly bring nearer.
    """
    num, side, _ = planes.shape
    level = (planes - _MIDDLE) / _LEVELS
    details = [detail(planes, width) / _DETAIL_LEVELS for width in _DETAIL_PX]
    by = np.stack([np.ones_like(level), level, level**2, level**3, *details], axis=-1).reshape(num, side * side, 6)
    weighted = (by * known.reshape(num, side * side, 1)).transpose(0, 2, 1)
    normal = weighted @ by
    normal[:, range(6), range(6)] += _DAMPING
    terms = np.linalg.solve(normal, weighted @ (others - planes).reshape(num, side * side, 1))
    change = (by @ terms).reshape(planes.shape).clip(-_MAX_CHANGE, _MAX_CHANGE)
    return np.asarray(planes + change, np.float32)
