"""Distances between two sets of features (Fréchet, KID, CMMD), each with its spread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

NUM_GROUPS = 10
# Student's t at 97.5 %, for 1, 2, ... degrees of freedom (groups - 1).
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_NORMAL = 1.96
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Gaussian:
    """Mean (d,) and covariance (d, d) of `num` feature vectors (None: not recorded), float64."""

    mean: Floats
    covariance: Floats
    num: int | None = None


def gaussian_of(features: Floats) -> Gaussian:
    """Mean and covariance (divided by n - 1, as numpy and pytorch-fid do) of (n, d) features, n at least 2."""
    wide = np.asarray(features, np.float64)
    return Gaussian(wide.mean(axis=0), np.atleast_2d(np.cov(wide, rowvar=False)), len(wide))


class FrechetDistance:
    """Distances to one reference.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500, eq. 6). The trace of the root is
    the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2). That matrix is symmetric, which avoids the complex
    numbers and the offset for singular covariances that a root of the product itself brings.
    """

    def __init__(self, reference: Gaussian):
        self.reference = reference
        values, vectors = np.linalg.eigh(reference.covariance)
        self._root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T

    def to(self, other: Gaussian) -> float:
        """Returns the distance to a Gaussian of the same dimension."""
        product = self._root @ other.covariance @ self._root
        root_trace = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum()
        shift = np.square(other.mean - self.reference.mean).sum()
        distance = shift + np.trace(self.reference.covariance) + np.trace(other.covariance) - 2 * root_trace
        return max(0.0, float(distance))

    def spread(self, features: Floats) -> float:
        """Half of the 95 % interval over redraws of the (n, d) features; the reference is fixed."""
        return half_width([self.to(part) for part in _without_each_group(np.asarray(features, np.float64))])


def _without_each_group(features: Floats) -> Iterator[Gaussian]:
    """Yields the Gaussian with each group left out, from sums, so that products are computed once."""
    centre = features.mean(axis=0)
    groups = [features[members] - centre for members in grouped(len(features))]
    total, products = np.zeros_like(centre), np.zeros((len(centre), len(centre)))
    for group in groups:
        total += group.sum(axis=0)
        products += group.T @ group
    for group in groups:
        num = len(features) - len(group)
        mean = (total - group.sum(axis=0)) / num
        covariance = (products - group.T @ group - num * np.outer(mean, mean)) / max(1, num - 1)
        yield Gaussian(centre + mean, covariance, num)


def kid_subset_size(num: int, num_reference: int) -> int:
    """1000, as published, or half of the smaller set: subsets as large as a set would all be equal."""
    return max(2, min(KID_SUBSET_SIZE, num // 2, num_reference // 2))


def kid(features: Floats, reference: Floats, seed: int = 0, num_subsets: int = KID_SUBSETS) -> tuple[float, float]:
    """Mean and standard deviation, over random subsets, of the unbiased squared MMD with the kernel (x.y / d + 1)^3.

    Bińkowski et al. 2018, arXiv:1801.01401; subsets as in torch-fidelity. The features are (n, d) and (m, d); the
    result may be slightly negative by chance.
    """
    rng, size = np.random.default_rng(seed), kid_subset_size(len(features), len(reference))
    values = []
    for _ in range(num_subsets):
        ours, theirs = (
            np.asarray(of[np.sort(rng.choice(len(of), size, replace=False))], np.float64)
            for of in (features, reference)
        )
        values.append(unbiased_mmd(ours, theirs))
    return float(np.mean(values)), float(np.std(values))


def unbiased_mmd(x: Floats, y: Floats) -> float:
    """The unbiased squared maximum mean discrepancy of (n, d) and (m, d) features with KID's polynomial kernel.

    Gretton et al. 2012, "A Kernel Two-Sample Test", lemma 6.
    """
    xx, yy, xy = _cubic(x, x), _cubic(y, y), _cubic(x, y)
    n, m = len(x), len(y)
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * xy.mean())


def _cubic(x: Floats, y: Floats) -> Floats:
    product: Floats = (x @ y.T / x.shape[1] + 1) ** 3
    return product


def cmmd(embeddings: Floats, reference: Floats) -> tuple[float, float]:
    """1000 times the squared MMD of CLIP embeddings with a Gaussian kernel of width 10, and half its 95 % interval.

    Jayasumana et al. 2024, arXiv:2401.09603: means over all pairs, self-pairs included, as in their code
    (google-research, cmmd/distance.py). Both inputs are (n, d), of length 1; the interval takes the reference as fixed.
    """
    x, y = np.asarray(embeddings, np.float64), np.asarray(reference, np.float64)
    groups, everything = grouped(len(x)), [np.arange(len(y))]
    within, across = _block_sums(x, x, groups, groups), _block_sums(x, y, groups, everything)[:, 0]
    reference_mean = _block_sums(y, y, everything, everything)[0, 0] / len(y) ** 2

    def distance(kept: Floats, num: int) -> float:
        mean_within, mean_across = kept @ within @ kept / num**2, kept @ across / (num * len(y))
        return float(CMMD_SCALE * (mean_within + reference_mean - 2 * mean_across))

    kept = np.ones(len(groups))
    without = [distance(kept - np.eye(len(groups))[i], len(x) - len(group)) for i, group in enumerate(groups)]
    return distance(kept, len(x)), half_width(without)


def _block_sums(x: Floats, y: Floats, rows: list[NDArray[np.int64]], columns: list[NDArray[np.int64]]) -> Floats:
    sums = np.zeros((len(rows), len(columns)))
    for i, row_group in enumerate(rows):
        for first in range(0, len(row_group), _ROWS_AT_ONCE):
            part = x[row_group[first : first + _ROWS_AT_ONCE]]
            for j, column_group in enumerate(columns):
                for start in range(0, len(column_group), _ROWS_AT_ONCE):
                    other = y[column_group[start : start + _ROWS_AT_ONCE]]
                    sums[i, j] += _gaussian(part, other).sum()
    return sums


def _gaussian(x: Floats, y: Floats) -> Floats:
    squared = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * x @ y.T
    values: Floats = np.exp(-squared.clip(min=0) / (2 * CMMD_SIGMA**2))
    return values


def grouped(num: int) -> list[NDArray[np.int64]]:
    """Deals the numbers below `num` round-robin into at most ten groups."""
    return [np.arange(first, num, NUM_GROUPS) for first in range(min(NUM_GROUPS, num))]


def half_width(without_each_group: Sequence[float]) -> float:
    """Half of the 95 % interval from a statistic computed without each group in turn (the grouped jackknife).

    All values use equally many images, so a bias that depends on the number, as FID's does, cancels. Efron and
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
