"""Distances between two sets of features by kernels: KID and CMMD."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdtrain.evaluation.jackknife import grouped, half_width

Floats = NDArray[np.floating[Any]]

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
_ROWS_AT_ONCE = 2048


def kid_subset_size(num: int, num_reference: int) -> int:
    """1000, as published, or half of the smaller set: subsets of a whole set would all be the same."""
    return max(2, min(KID_SUBSET_SIZE, num // 2, num_reference // 2))


def kid(features: Floats, reference: Floats, seed: int = 0, num_subsets: int = KID_SUBSETS) -> tuple[float, float]:
    """Mean and standard deviation, over random subsets, of the unbiased squared MMD with the kernel (x.y / d + 1)^3.

    Bińkowski et al. 2018, arXiv:1801.01401; subsets as in torch-fidelity. May be a little below 0 by chance.

    Args:
        features: (n, d).
        reference: (m, d).
        seed: of the subsets.
        num_subsets: how many.
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

    Jayasumana et al. 2024, arXiv:2401.09603: means over all pairs, an image with itself included, as in their code
    (google-research, cmmd/distance.py). The interval counts the reference as given.

    Args:
        embeddings: (n, d), of length 1.
        reference: (m, d), likewise.
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
    """Sums of the Gaussian kernel over each group of rows with each group of columns."""
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
