"""How far a number could lie from itself, had other images been drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_GROUPS = 10
# Student's t at 97.5 % for one degree of freedom fewer than groups, from 1 on.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_NORMAL = 1.96


def grouped(num: int) -> list[NDArray[np.int64]]:
    """The numbers below `num` in at most ten groups as equal as can be, dealt out in turn."""
    return [np.arange(first, num, NUM_GROUPS) for first in range(min(NUM_GROUPS, num))]


def half_width(without_each_group: Sequence[float]) -> float:
    """Half of the 95 % interval from a statistic computed without each group in turn: the grouped jackknife.

    All of these have the same number of images, so a bias that depends on it, as FID's does, falls out. Efron and
    Tibshirani 1993, "An Introduction to the Bootstrap", chapter 11.
    """
    values = np.asarray(without_each_group, np.float64)
    num = len(values)
    if num < 2:
        return float("nan")
    error = np.sqrt((num - 1) / num * np.square(values - values.mean()).sum())
    return float(_T[num - 2] * error)


def half_width_of_mean(values: NDArray[np.floating[Any]]) -> float:
    """Half of the 95 % interval of the mean of independent values."""
    return float(_NORMAL * np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
