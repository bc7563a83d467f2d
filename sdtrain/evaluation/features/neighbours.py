"""Precision, recall, density and coverage: how far drawn and real images lie in each other's neighbourhoods."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sdtrain.evaluation.distances import Floats, grouped, half_width, half_width_of_mean

PRECISION_K, DENSITY_K = 3, 5
"""Neighbours within a ball: Kynkäänniemi et al. 2019, section 3.1; Naeem et al. 2020, section 4.2."""
MOST_K = max(PRECISION_K, DENSITY_K)
_ROWS, _COLUMNS = 1024, 4096
"""Of a block of distances, which takes 32 MiB; two sets of 30,000 images have 7 GiB of them."""

Estimate = tuple[float, float]
"""A number, and half of its 95 % interval."""


@dataclass(frozen=True)
class Overlap:
    """What share of either set lies near the other, each with its spread over redraws; the real images are fixed.

    precision, recall: the share of drawn (real) images that lie in the ball of a real (drawn) one, which reaches to its
    3rd nearest neighbour in its own set (Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2). density: in how many
    real images' balls, to the 5th neighbour, a drawn image lies on average, divided by 5, so it may exceed 1; coverage:
    the share of these balls that hold a drawn image (Naeem et al. 2020, arXiv:2002.09797, eq. 3 and 4). As in the
    authors' programs the ball's surface counts for the former pair, and not for the latter.
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


class RealNeighbours:
    """The balls of (m, d) real images, m > 5, which are found once and compared with many drawn sets.

    Distances are float64 and never held for more than a block of pairs.
    """

    def __init__(self, real: Floats):
        self._real = real
        nearest = _nearest_in_groups(real, MOST_K, [np.arange(len(real))])[:, 0]
        self._precision_radii, self._density_radii = nearest[:, PRECISION_K - 1], nearest[:, DENSITY_K - 1]
        self._latest: tuple[Floats, Overlap] | None = None

    def overlap(self, drawn: Floats) -> Overlap:
        """Compares (n, d) drawn images, n > 3; asked again for the same array, it gives what it found."""
        if self._latest is None or self._latest[0] is not drawn:
            self._latest = drawn, self._compare(drawn)
        return self._latest[1]

    def _compare(self, drawn: Floats) -> Overlap:
        groups = grouped(len(drawn))
        radii = _radii_without_groups(_nearest_in_groups(drawn, PRECISION_K, groups), groups)
        is_precise, num_balls = np.zeros(len(drawn), bool), np.zeros(len(drawn), np.int64)
        is_recalled = np.zeros((len(self._real), len(radii)), bool)
        nearest = np.full((len(self._real), len(groups)), np.inf)
        for rows in _slices(len(self._real), _ROWS):
            for group, members in enumerate(groups):
                for columns in (members[part] for part in _slices(len(members), _COLUMNS)):
                    distances = _squared_distances(self._real[rows], drawn[columns])
                    is_precise[columns] |= (distances <= self._precision_radii[rows, None]).any(axis=0)
                    num_balls[columns] += (distances < self._density_radii[rows, None]).sum(axis=0)
                    nearest[rows, group] = np.minimum(nearest[rows, group], distances.min(axis=1))
                    for without, radii_now in enumerate(radii):
                        is_recalled[rows, without] |= (distances <= radii_now[columns]).any(axis=1)
        is_covered = _minima_without_groups(nearest) < self._density_radii[:, None]
        return Overlap(
            precision=_mean(is_precise),
            recall=_jackknife(is_recalled),
            density=_mean(num_balls / DENSITY_K),
            coverage=_jackknife(is_covered),
        )


def _mean(values: NDArray[np.bool_] | Floats) -> Estimate:
    """Of independent images, as the real ones are fixed."""
    wide = np.asarray(values, np.float64)
    return float(wide.mean()), half_width_of_mean(wide)


def _jackknife(shares: NDArray[np.bool_]) -> Estimate:
    """From (m, 1 + g): with all drawn images, and without each group of them."""
    everything, *without_each_group = shares.mean(axis=0).tolist()
    return everything, half_width(without_each_group)


def _nearest_in_groups(points: Floats, k: int, groups: list[NDArray[np.int64]]) -> Floats:
    """(n, g, k): squared distances to the k nearest others in each group, ascending; inf where there are fewer."""
    found = np.full((len(points), len(groups), k), np.inf)
    for rows in _slices(len(points), _ROWS):
        indices = np.arange(len(points))[rows]
        for group, members in enumerate(groups):
            for columns in (members[part] for part in _slices(len(members), _COLUMNS)):
                distances = _squared_distances(points[rows], points[columns])
                distances[indices[:, None] == columns] = np.inf  # a point is not its own neighbour
                candidates = np.concatenate([found[rows, group], distances], axis=1)
                found[rows, group] = np.sort(np.partition(candidates, k - 1, axis=1)[:, :k], axis=1)
    return found


def _radii_without_groups(nearest: Floats, groups: list[NDArray[np.int64]]) -> list[Floats]:
    """Each drawn image's squared radius: among all, then without each group, whose own members have no ball then."""
    k = nearest.shape[2]
    radii = [_kth(nearest, k)]
    for group, members in enumerate(groups):
        without = _kth(np.delete(nearest, group, axis=1), k)
        without[members] = -1.0
        radii.append(without)
    return radii


def _kth(nearest: Floats, k: int) -> Floats:
    """The k-th smallest of all groups' nearest; -1, which no distance is, where there are fewer."""
    candidates = nearest.reshape(len(nearest), -1)
    if candidates.shape[1] < k:
        return np.full(len(nearest), -1.0)
    kth = np.partition(candidates, k - 1, axis=1)[:, k - 1]
    return np.where(np.isfinite(kth), kth, -1.0)


def _minima_without_groups(nearest: Floats) -> Floats:
    """(m, g) -> (m, 1 + g): the minimum over all groups, then without each."""
    without = [np.delete(nearest, group, axis=1).min(axis=1, initial=np.inf) for group in range(nearest.shape[1])]
    return np.stack([nearest.min(axis=1), *without], axis=1)


def _squared_distances(x: Floats, y: Floats) -> Floats:
    wide_x, wide_y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    squared = np.square(wide_x).sum(axis=1)[:, None] + np.square(wide_y).sum(axis=1) - 2 * wide_x @ wide_y.T
    clipped: Floats = squared.clip(min=0)
    return clipped


def _slices(num: int, size: int) -> Iterator[slice]:
    for first in range(0, num, size):
        yield slice(first, first + size)
