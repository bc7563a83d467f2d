"""Semantic duplicates: embeddings within a cluster whose cosine is above a threshold.

Follows SemDeDup (Abbas et al. 2023, arXiv 2303.09540); `filters.decide.stage` decides which one stays.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from filters.dedup.clusters import Embedded, Vectors, unit
from filters.dedup.union_find import Components

_ROWS_AT_ONCE, _PAIRS_AT_ONCE = 1024, 1 << 16
# Exceeds the error of float32 products of unit vectors: closer calls are recomputed.
_ROUNDING = 1e-4


def link_similar(clusters: Iterator[Embedded], threshold: float, components: Components) -> None:
    """Links images in each cluster whose embeddings have a cosine of at least `threshold`.

    Rounding of matrix products depends on the machine's kernels and threads, so they only propose pairs; the decisive
    cosine is one of two vectors, in float64.
    """
    for nodes, stored in clusters:
        vectors = unit(stored)
        for ones, others in _proposed(vectors, threshold - _ROUNDING):
            apart = components.roots(nodes[ones]) != components.roots(nodes[others])
            ones, others = ones[apart], others[apart]
            close = _cosines(stored[ones], stored[others]) >= threshold
            components.link(nodes[ones[close]], nodes[others[close]])


def _proposed(vectors: Vectors, threshold: float) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yields pairs of rows whose product is at least `threshold`, block by block of the upper triangle."""
    for top in range(0, len(vectors), _ROWS_AT_ONCE):
        for left in range(top, len(vectors), _ROWS_AT_ONCE):
            products = vectors[top : top + _ROWS_AT_ONCE] @ vectors[left : left + _ROWS_AT_ONCE].T
            rows, columns = np.nonzero(products >= threshold)
            ones, others = rows + top, columns + left
            upper = ones < others
            ones, others = ones[upper], others[upper]
            for start in range(0, len(ones), _PAIRS_AT_ONCE):
                yield ones[start : start + _PAIRS_AT_ONCE], others[start : start + _PAIRS_AT_ONCE]


def _cosines(stored: NDArray[np.float16], others: NDArray[np.float16]) -> NDArray[np.float64]:
    one, other = stored.astype(np.float64), others.astype(np.float64)
    lengths = np.sqrt((one * one).sum(axis=1) * (other * other).sum(axis=1))
    cosines: NDArray[np.float64] = (one * other).sum(axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return cosines
