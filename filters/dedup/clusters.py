"""Clustering of embeddings, so that only neighbours need be compared."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from filters.dedup.columns import Images
from sdtrain.dataset.progress import report_progress
from sdtrain.errors import UserError

_ROWS_PER_BUCKET = 1 << 19  # 0.8 GB of 768 numbers in fp16
_MAX_BUCKETS = 128  # each is three open files, and a process may have 1,024


class Embedded(NamedTuple):
    """Image numbers `nodes` (N,) and their stored fp16 embeddings `vectors` (N, D)."""

    nodes: NDArray[np.int64]
    vectors: NDArray[np.float16]


@dataclass(frozen=True)
class Clustering:
    """How the embeddings of `column` are clustered: each is in the clusters of its `num_nearest` nearest centres."""

    column: str
    num_clusters: int
    num_nearest: int
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_nearest", min(self.num_nearest, self.num_clusters))


class Buckets:
    """Takes embeddings in any order and returns them cluster by cluster."""

    def __init__(self, folder: Path, num_rows: int, num_clusters: int) -> None:
        self._folder = folder
        self._num_clusters = num_clusters
        self._num = min(_MAX_BUCKETS, num_clusters, 1 + num_rows // _ROWS_PER_BUCKET)
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
        """Writes embeddings with their cluster numbers."""
        self._width = embedded.vectors.shape[1]
        buckets = owners.astype(np.int64) * self._num // self._num_clusters
        for bucket in np.unique(buckets).tolist():
            chosen = buckets == bucket
            columns: tuple[NDArray[Any], ...] = (owners, embedded.nodes, embedded.vectors)
            for values, file in zip(columns, self._files[bucket], strict=True):
                values[chosen].tofile(file)

    def clusters(self) -> Iterator[Embedded]:
        """Yields the embeddings of each non-empty cluster, one in memory at a time."""
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


# Up to this number all pairs are compared: it takes seconds, and misses nothing between clusters.
MAX_ONE_CLUSTER = 1 << 14
_ROWS_AT_ONCE = 4096
_TRAINING_ROWS_PER_CLUSTER, _MAX_TRAINING_BYTES = 64, 1 << 31

Vectors = NDArray[np.float32]


def num_clusters_for(num_images: int, wanted: int | None) -> int:
    """Returns the wanted number of clusters, by default one for few images, else the square root of their number."""
    if wanted is None:
        wanted = 1 if num_images <= MAX_ONE_CLUSTER else round(math.sqrt(num_images))
    return max(1, min(wanted, num_images))


def cluster(images: Images, clustering: Clustering, folder: Path) -> Iterator[Embedded]:
    """Yields each cluster's embeddings, which it stores in `folder` meanwhile, in each of their clusters.

    Independent of the number of threads and the order of images: the centres are learnt from the images with the
    smallest uids, which are digests and thus a random sample, and all matrix products have one size. UserError if
    several clusters are needed and faiss is not installed.
    """
    column, num_clusters, num_nearest = clustering.column, clustering.num_clusters, clustering.num_nearest
    if num_clusters == 1:
        owned = _all_in_one(images, column)
    else:
        owned = _owned(images, column, learn_centers(images, num_clusters, clustering.seed, column), num_nearest)
    with Buckets(folder, images.num * num_nearest, num_clusters) as buckets:
        step = f"dedup: clusters by {column}"
        for embedded, owners in report_progress(owned, step, images.num, "embeddings", lambda pair: len(pair[1])):
            for nearest in owners.T:
                buckets.add(embedded, np.ascontiguousarray(nearest))
    yield from buckets.clusters()


def unit(vectors: NDArray[np.float16]) -> Vectors:
    """Scales the vectors to length 1 in float32; zero stays zero."""
    wide = vectors.astype(np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", wide, wide))[:, None]
    unit_vectors: Vectors = np.divide(wide, lengths, out=np.zeros_like(wide), where=lengths > 0)
    return unit_vectors


def learn_centers(images: Images, num_clusters: int, seed: int, column: str = "embedding") -> Vectors:
    """Learns (K, D) unit centres by cosine k-means on a sample; raises `UserError` without faiss."""
    sample = unit(_sample(images, num_clusters, column))
    options = {"niter": 20, "seed": seed, "spherical": True, "min_points_per_centroid": 1}
    options["max_points_per_centroid"] = len(sample)  # it is already a sample
    kmeans = load_faiss().Kmeans(sample.shape[1], min(num_clusters, len(sample)), **options)
    with _one_thread_each(1) as thread:
        thread.submit(kmeans.train, sample).result()
    centers: Vectors = kmeans.centroids
    return centers


def load_faiss(
    wanted_by: str = "duplicates.level: semantic, for so many images,",
    otherwise: str = ", or set duplicates.level to perceptual",
) -> Any:
    """Imports faiss, or raises `UserError` that names what needs it (`wanted_by`) and the alternative (`otherwise`)."""
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            f"{wanted_by} needs faiss. Install it with `pip install 'sdtrain[semantic]'`{otherwise}."
        ) from error
    return faiss


def _all_in_one(images: Images, column: str) -> Iterator[tuple[Embedded, NDArray[np.int32]]]:
    for embedded in _blocks(images, column):
        yield embedded, np.zeros((len(embedded.nodes), 1), np.int32)


def _owned(
    images: Images, column: str, centers: Vectors, num_nearest: int
) -> Iterator[tuple[Embedded, NDArray[np.int32]]]:
    """Yields all embeddings with the clusters of their nearest centres, (N, num_nearest), the nearest first.

    They come in order; each processor works on its own block.
    """
    num_nearest = min(num_nearest, len(centers))
    index = load_faiss().IndexFlatIP(centers.shape[1])
    index.add(centers)

    def nearest(vectors: NDArray[np.float16]) -> NDArray[np.int32]:
        # Always the same size: matrix kernels round differently at edges.
        padded = np.zeros((_ROWS_AT_ONCE, vectors.shape[1]), np.float32)
        padded[: len(vectors)] = unit(vectors)
        owners: NDArray[np.int32] = index.search(padded, num_nearest)[1][: len(vectors)].astype(np.int32)
        return owners.clip(0)  # NaN has nearest centre -1

    num_threads = len(os.sched_getaffinity(0))
    with _one_thread_each(num_threads) as threads:
        waiting = deque[tuple[Embedded, Future[NDArray[np.int32]]]]()
        for embedded in _blocks(images, column):
            waiting.append((embedded, threads.submit(nearest, embedded.vectors)))
            if len(waiting) > 2 * num_threads:
                done, owners = waiting.popleft()
                yield done, owners.result()
        yield from ((embedded, owners.result()) for embedded, owners in waiting)


def _one_thread_each(num_threads: int) -> ThreadPoolExecutor:
    """Returns threads in which faiss is single-threaded: its thread count changes the last digits."""
    return ThreadPoolExecutor(num_threads, initializer=load_faiss().omp_set_num_threads, initargs=(1,))


def _sample(images: Images, num_clusters: int, column: str) -> NDArray[np.float16]:
    """Returns the embeddings of the images with the smallest uids, in uid order."""
    best, num_rows = list[pa.Table](), num_clusters * _TRAINING_ROWS_PER_CLUSTER
    for table in images.read(["uid", column]):
        best.append(table.filter(pc.is_valid(table[column])))
        vector_bytes = 4 * table.schema.field(column).type.list_size
        num_rows = min(num_rows, max(num_clusters, _MAX_TRAINING_BYTES // vector_bytes))
        if sum(map(len, best)) > 2 * num_rows:
            best = [_smallest(best, num_rows)]
    return _vectors(_smallest(best, num_rows)[column])


def _smallest(tables: list[pa.Table], num_rows: int) -> pa.Table:
    rows = pa.concat_tables(tables)
    chosen = pc.sort_indices(rows["uid"])[:num_rows]
    return rows.take(chosen).combine_chunks()


def _blocks(images: Images, column: str) -> Iterator[Embedded]:
    start = 0
    for table in images.read([column]):
        embeddings = table[column]
        nodes = start + np.flatnonzero(pc.is_valid(embeddings).to_numpy())
        vectors = _vectors(embeddings.drop_null())
        start += len(table)
        for low in range(0, len(nodes), _ROWS_AT_ONCE):
            yield Embedded(nodes[low : low + _ROWS_AT_ONCE], vectors[low : low + _ROWS_AT_ONCE])


def _vectors(embeddings: pa.ChunkedArray) -> NDArray[np.float16]:
    width = embeddings.type.list_size
    values: NDArray[np.float16] = embeddings.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, width)
