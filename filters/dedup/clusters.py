"""Clustering of embeddings, so that only neighbours need be compared."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
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


class Buckets:
    """Takes embeddings in any order and returns them cluster by cluster."""

    def __init__(self, folder: Path, num_images: int, num_clusters: int) -> None:
        self._folder = folder
        self._num_clusters = num_clusters
        self._num = min(_MAX_BUCKETS, num_clusters, 1 + num_images // _ROWS_PER_BUCKET)
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


def cluster(images: Images, num_clusters: int, seed: int, folder: Path) -> Iterator[Embedded]:
    """Yields each cluster's embeddings, which it stores in `folder` meanwhile.

    Independent of the number of threads and the order of images: the centres are learnt from the images with the
    smallest uids, which are digests and thus a random sample, and all matrix products have one size. UserError if
    several clusters are needed and faiss is not installed.
    """
    owned = _all_in_one(images) if num_clusters == 1 else _owned(images, learn_centers(images, num_clusters, seed))
    with Buckets(folder, images.num, num_clusters) as buckets:
        for embedded, owners in report_progress(
            owned, "dedup: clusters", images.num, "embeddings", lambda pair: len(pair[1])
        ):
            buckets.add(embedded, owners)
    yield from buckets.clusters()


def unit(vectors: NDArray[np.float16]) -> Vectors:
    """Scales the vectors to length 1 in float32; zero stays zero."""
    wide = vectors.astype(np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", wide, wide))[:, None]
    unit_vectors: Vectors = np.divide(wide, lengths, out=np.zeros_like(wide), where=lengths > 0)
    return unit_vectors


def learn_centers(images: Images, num_clusters: int, seed: int) -> Vectors:
    """Learns (K, D) unit centres by cosine k-means on a sample; raises `UserError` without faiss."""
    sample = unit(_sample(images, num_clusters))
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


def _all_in_one(images: Images) -> Iterator[tuple[Embedded, NDArray[np.int32]]]:
    for embedded in _blocks(images):
        yield embedded, np.zeros(len(embedded.nodes), np.int32)


def _owned(images: Images, centers: Vectors) -> Iterator[tuple[Embedded, NDArray[np.int32]]]:
    """Yields all embeddings with their nearest centre's cluster, in order; each processor works on its own block."""
    index = load_faiss().IndexFlatIP(centers.shape[1])
    index.add(centers)

    def nearest(vectors: NDArray[np.float16]) -> NDArray[np.int32]:
        # Always the same size: matrix kernels round differently at edges.
        padded = np.zeros((_ROWS_AT_ONCE, vectors.shape[1]), np.float32)
        padded[: len(vectors)] = unit(vectors)
        owners: NDArray[np.int32] = index.search(padded, 1)[1][: len(vectors), 0].astype(np.int32)
        return owners.clip(0)  # NaN has nearest centre -1

    num_threads = len(os.sched_getaffinity(0))
    with _one_thread_each(num_threads) as threads:
        waiting = deque[tuple[Embedded, Future[NDArray[np.int32]]]]()
        for embedded in _blocks(images):
            waiting.append((embedded, threads.submit(nearest, embedded.vectors)))
            if len(waiting) > 2 * num_threads:
                done, owners = waiting.popleft()
                yield done, owners.result()
        yield from ((embedded, owners.result()) for embedded, owners in waiting)


def _one_thread_each(num_threads: int) -> ThreadPoolExecutor:
    """Returns threads in which faiss is single-threaded: its thread count changes the last digits."""
    return ThreadPoolExecutor(num_threads, initializer=load_faiss().omp_set_num_threads, initargs=(1,))


def _sample(images: Images, num_clusters: int) -> NDArray[np.float16]:
    """Returns the embeddings of the images with the smallest uids, in uid order."""
    best, num_rows = list[pa.Table](), num_clusters * _TRAINING_ROWS_PER_CLUSTER
    for table in images.read(["uid", "embedding"]):
        best.append(table.filter(pc.is_valid(table["embedding"])))
        vector_bytes = 4 * table.schema.field("embedding").type.list_size
        num_rows = min(num_rows, max(num_clusters, _MAX_TRAINING_BYTES // vector_bytes))
        if sum(map(len, best)) > 2 * num_rows:
            best = [_smallest(best, num_rows)]
    return _vectors(_smallest(best, num_rows)["embedding"])


def _smallest(tables: list[pa.Table], num_rows: int) -> pa.Table:
    rows = pa.concat_tables(tables)
    chosen = pc.sort_indices(rows["uid"])[:num_rows]
    return rows.take(chosen).combine_chunks()


def _blocks(images: Images) -> Iterator[Embedded]:
    start = 0
    for table in images.read(["embedding"]):
        embeddings = table["embedding"]
        nodes = start + np.flatnonzero(pc.is_valid(embeddings).to_numpy())
        vectors = _vectors(embeddings.drop_null())
        start += len(table)
        for low in range(0, len(nodes), _ROWS_AT_ONCE):
            yield Embedded(nodes[low : low + _ROWS_AT_ONCE], vectors[low : low + _ROWS_AT_ONCE])


def _vectors(embeddings: pa.ChunkedArray) -> NDArray[np.float16]:
    width = embeddings.type.list_size
    values: NDArray[np.float16] = embeddings.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, width)
