"""Embeddings on disk, by cluster: the clusters of one bucket share a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_ROWS_PER_BUCKET = 1 << 19  # 0.8 GB of 768 numbers in fp16
_MAX_BUCKETS = 128  # each is three open files, of which a process may have 1,024


class Embedded(NamedTuple):
    """Some images that have an embedding.

    Attributes:
        nodes: (N,) their numbers.
        vectors: (N, D) fp16, as they are stored.
    """

    nodes: NDArray[np.int64]
    vectors: NDArray[np.float16]


class Buckets:
    """Takes embeddings in any order and gives them back cluster by cluster."""

    def __init__(self, folder: Path, num_pictures: int, num_clusters: int) -> None:
        self._folder = folder
        self._num_clusters = num_clusters
        self._num = min(_MAX_BUCKETS, num_clusters, 1 + num_pictures // _ROWS_PER_BUCKET)
        self._width = 0
        self._stack = ExitStack()

    def __enter__(self) -> Buckets:
        self._files = [
            [self._open(bucket, part) for part in ("owners", "nodes", "vectors")] for bucket in range(self._num)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, embedded: Embedded, owners: NDArray[np.int32]) -> None:
        """Writes embeddings with the numbers of their clusters."""
        self._width = embedded.vectors.shape[1]
        buckets = owners.astype(np.int64) * self._num // self._num_clusters
        for bucket in np.unique(buckets).tolist():
            chosen = buckets == bucket
            columns: tuple[NDArray[Any], ...] = (owners, embedded.nodes, embedded.vectors)
            for values, file in zip(columns, self._files[bucket], strict=True):
                values[chosen].tofile(file)

    def clusters(self) -> Iterator[Embedded]:
        """The embeddings of each cluster that has any, in memory one at a time."""
        for bucket in range(self._num):
            owners = np.fromfile(self._path(bucket, "owners"), np.int32)
            if not len(owners):
                continue
            nodes = np.fromfile(self._path(bucket, "nodes"), np.int64)
            shape = (len(nodes), self._width)
            vectors = np.memmap(self._path(bucket, "vectors"), np.float16, "r", shape=shape)
            order = np.argsort(owners, kind="stable")
            for rows in np.split(order, 1 + np.flatnonzero(np.diff(owners[order]))):
                yield Embedded(nodes[rows], np.asarray(vectors[rows]))

    def _open(self, bucket: int, part: str) -> IO[bytes]:
        return self._stack.enter_context(self._path(bucket, part).open("wb"))

    def _path(self, bucket: int, part: str) -> Path:
        return self._folder / f"bucket{bucket:03d}.{part}"
