"""The Fréchet distance between two sets of features, FID where they are Inception's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdtrain.evaluation.jackknife import grouped, half_width

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Gaussian:
    """Mean (d,) and covariance (d, d) of features, float64.

    Attributes:
        num: features that they are of; None where nobody said.
    """

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
    the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric: so there are no complex
    numbers, and singular covariances need no offset, as they do with a root of the product itself.
    """

    def __init__(self, reference: Gaussian):
        self.reference = reference
        values, vectors = np.linalg.eigh(reference.covariance)
        self._root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T

    def to(self, other: Gaussian) -> float:
        """The distance of a Gaussian in as many dimensions."""
        product = self._root @ other.covariance @ self._root
        root_trace = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum()
        shift = np.square(other.mean - self.reference.mean).sum()
        distance = shift + np.trace(self.reference.covariance) + np.trace(other.covariance) - 2 * root_trace
        return max(0.0, float(distance))

    def spread(self, features: Floats) -> float:
        """Half of the 95 % interval that the choice of the (n, d) features leaves; the reference counts as given."""
        return half_width([self.to(part) for part in _without_each_group(np.asarray(features, np.float64))])


def _without_each_group(features: Floats) -> Iterator[Gaussian]:
    """The Gaussian without each group of the features in turn, from sums, so that they are multiplied once."""
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
