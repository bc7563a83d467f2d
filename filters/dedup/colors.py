"""Whether images agree in colour, which the perceptual hash does not see."""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

# Largest difference (0 to 255) between the 4x4 colour thumbnails of copies. The perceptual hash sees brightness only,
# so a red and a blue disc look alike to it; recompressed and resized copies differ by 3 or less.
MAX_COLOR_DIFFERENCE = 16

_CELL = MAX_COLOR_DIFFERENCE + 1
_ROW = 256 // _CELL + 2  # one more than there are cells, so that a cell's neighbours never belong to the next row
_PLACES = np.array([1, _ROW, _ROW * _ROW])
_NEIGHBOURS = [int(np.dot(_PLACES, steps)) for steps in product((-1, 0, 1), repeat=len(_PLACES))]

Colors = NDArray[np.uint8]


def agree(colors: Colors, others: Colors) -> NDArray[np.bool_]:
    """Whether thumbnails, (..., C) channel values, are within the largest difference in every channel."""
    difference = np.maximum(colors, others) - np.minimum(colors, others)
    within: NDArray[np.bool_] = difference.max(axis=-1, initial=0) <= MAX_COLOR_DIFFERENCE
    return within


def seeds_of(colors: Colors) -> NDArray[np.int64]:
    """(N,) for each of some thumbnails, one of its connected set of those that agree, the same for all of the set.

    Each thumbnail that is reached takes those that agree with it, and they are not looked at again.
    """
    waiting, seeds = _Waiting(colors), np.full(len(colors), -1)
    for seed in range(len(colors)):
        if seeds[seed] >= 0:
            continue
        reached, seeds[seed] = [seed], seed
        while reached:
            taken = waiting.take_agreeing(reached.pop())
            new = taken[seeds[taken] < 0]
            seeds[new] = seed
            reached += new.tolist()
    return seeds


class _Waiting:
    """Thumbnails by cells of the three channels that vary most: those that agree are in one cell or in neighbours."""

    def __init__(self, colors: Colors) -> None:
        self._colors = colors
        channels = np.argsort(np.ptp(colors, axis=0), kind="stable")[-len(_PLACES) :]
        self._keys = colors[:, channels].astype(np.int64) // _CELL @ _PLACES
        order = np.argsort(self._keys, kind="stable")
        rows = np.split(order, 1 + np.flatnonzero(np.diff(self._keys[order])))
        self._cells = {int(self._keys[some[0]]): some for some in rows if len(some)}

    def take_agreeing(self, row: int) -> NDArray[np.int64]:
        """Those still here that agree with `row`, which leave."""
        taken, key = [np.empty(0, np.int64)], int(self._keys[row])
        for cell in (key + step for step in _NEIGHBOURS):
            rows = self._cells.get(cell)
            if rows is None:
                continue
            same = agree(self._colors[rows], self._colors[row])
            if same.any():
                taken.append(rows[same])
                self._cells[cell] = rows[~same]
                if same.all():
                    del self._cells[cell]
        return np.concatenate(taken)
