"""Links images with similar embeddings: CLIP's, of one content, and SSCD's, of one original.

Follows SemDeDup (Abbas et al. 2023, arXiv 2303.09540): embeddings are clustered, and those of one cluster are compared;
`filters.decide.stage` decides which one stays. CLIP's lie close together, and each is in one cluster. SSCD's are spread
evenly over the sphere (its loss has an entropy term; Pizzi et al. 2022, arXiv 2202.10261, section 4.3), so copies with
a cosine of 0.75 seldom share their nearest centre: each is in the clusters of its 8 nearest ones. Of 100,000 random
embeddings, which have no clusters at all, that finds 99 % of the pairs with this cosine, where one cluster finds 21 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from filters.dedup.clusters import Clustering, Embedded, Vectors, cluster, num_clusters_for, unit
from filters.dedup.columns import Images
from filters.dedup.union_find import Components
from filters.recipe import DuplicatesConfig
from sdtrain.dataset.progress import report_progress

_BLOCK_ROWS, _PAIRS_AT_ONCE = 1024, 1 << 16
# Exceeds the error of float32 products of unit vectors: closer calls are recomputed.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Similarity:
    """A level's embeddings.

    Attributes:
        column: theirs.
        threshold: least cosine of duplicates.
        num_nearest: the clusters that each embedding is in.
    """

    column: str
    threshold: float
    num_nearest: int


def similarity_of(level: str, config: DuplicatesConfig) -> Similarity:
    """Returns what the level `copied` or `semantic` compares."""
    if level == "copied":
        return Similarity("sscd_embedding", config.copy_similarity, 8)
    return Similarity("embedding", config.semantic_threshold, 1)


def link_similar(
    images: Images, similarity: Similarity, config: DuplicatesConfig, folder: Path, components: Components
) -> None:
    """Links images in each cluster whose embeddings have a cosine of at least the threshold.

    Stores each embedding `num_nearest` times in `folder`. Rounding of matrix products depends on the machine's kernels
    and threads, so they only propose pairs; the decisive cosine is one of two vectors, in float64. UserError if several
    clusters are needed and faiss is not installed.
    """
    num_clusters = num_clusters_for(images.num, config.num_clusters)
    clustering = Clustering(similarity.column, num_clusters, similarity.num_nearest, config.seed)
    num = images.num * clustering.num_nearest
    step, clusters = f"dedup: pairs by {similarity.column}", cluster(images, clustering, folder)
    for embedded in report_progress(clusters, step, num, "embeddings", lambda embedded: len(embedded.nodes)):
        _link_cluster(embedded, similarity.threshold, components)


def _link_cluster(embedded: Embedded, threshold: float, components: Components) -> None:
    nodes, stored = _link_equal(embedded, threshold, components)
    for ones, others in _proposed(unit(stored), threshold - _ROUNDING):
        apart = components.roots(nodes[ones]) != components.roots(nodes[others])
        ones, others = ones[apart], others[apart]
        close = _cosines(stored[ones], stored[others]) >= threshold
        components.link(nodes[ones[close]], nodes[others[close]])


def _link_equal(embedded: Embedded, threshold: float, components: Components) -> Embedded:
    """Links embeddings that are equal to the bit, and returns one of each.

    A placeholder that a million hosts answer with would else be compared a million times a million.
    """
    nodes, stored = embedded
    rows = np.ascontiguousarray(stored).view(f"V{stored[0].nbytes}")[:, 0]
    _, first, places = np.unique(rows, return_index=True, return_inverse=True)
    same = first[places]
    repeated = np.flatnonzero(same != np.arange(len(nodes)))
    repeated = repeated[_cosines(stored[repeated], stored[repeated]) >= threshold]  # not so for zero
    components.link(nodes[same[repeated]], nodes[repeated])
    left = np.ones(len(nodes), bool)
    left[repeated] = False
    return Embedded(nodes[left], stored[left])


def _proposed(vectors: Vectors, threshold: float) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yields pairs of rows whose product is at least `threshold`, block by block of the upper triangle."""
    for top in range(0, len(vectors), _BLOCK_ROWS):
        for left in range(top, len(vectors), _BLOCK_ROWS):
            products = vectors[top : top + _BLOCK_ROWS] @ vectors[left : left + _BLOCK_ROWS].T
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
