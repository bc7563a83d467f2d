"""The embeddings that SCORE stored in a dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from filters.dedup.clusters import unit
from filters.dedup.columns import Images
from filters.dedup.stage import scored_images
from sdtrain.dataset.files import read_parquet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import require_entries, selected_shards
from sdtrain.errors import UserError

_FORMAT = "search/1"


@dataclass(frozen=True)
class Block:
    """Embeddings of one shard: float16 `vectors` (N, D), of length 1 up to rounding.

    The image `numbers` (N,) are row numbers over all shards' score tables.
    """

    numbers: NDArray[np.int64]
    vectors: NDArray[np.float16]


@dataclass(frozen=True)
class Embeddings:
    """All embeddings of a dataset, with the images' scores for k-means.

    `clip_model` is open_clip's name of their network, `clip_digest` its weights'; `counts` are (shard, rows), in order.
    """

    dataset: DatasetDir
    images: Images
    clip_model: str
    clip_digest: str
    width: int
    counts: tuple[tuple[int, int], ...]

    def blocks(self) -> Iterator[Block]:
        """Yields blocks shard by shard, without images that have no embedding."""
        start = 0
        for shard, num_rows in self.counts:
            column = read_parquet(self.dataset.scores(shard), ["embedding"])["embedding"]
            numbers = start + np.flatnonzero(pc.is_valid(column).to_numpy())
            values = column.drop_null().combine_chunks().flatten().to_numpy(zero_copy_only=False)
            yield Block(numbers, values.reshape(-1, self.width))
            start += num_rows


def embeddings_of(dataset: DatasetDir) -> Embeddings:
    """Returns a dataset's embeddings; raises `UserError` if they are missing or of different networks."""
    images = scored_images(dataset)
    if not images.has_embeddings:
        raise UserError(
            f"{dataset.root} has no embeddings to search. Set score.store_embeddings: true (and score.clip_weights) "
            f"in {dataset.recipe} and run `sdtrain build {dataset.recipe} --output {dataset.root}`: it scores again."
        )
    shards = list(selected_shards(dataset))
    schema = pq.read_schema(dataset.scores(shards[0]))
    metadata = schema.metadata or {}
    counts = tuple((shard, pq.read_metadata(dataset.scores(shard)).num_rows) for shard in shards)
    return Embeddings(
        dataset=dataset,
        images=images,
        clip_model=metadata.get(b"sdtrain.clip_model", b"").decode(),
        clip_digest=metadata.get(b"sdtrain.clip_digest", b"").decode(),
        width=schema.field("embedding").type.list_size,
        counts=counts,
    )


def embeddings_digest(dataset: DatasetDir) -> str:
    """Digests all files with embeddings, from the manifest alone; raises `UserError` if a shard is unscored."""
    outputs = (entry.outputs for entry in require_entries(dataset, "score", selected_shards(dataset)))
    files = [[(name, output.sha256) for name, output in sorted(shard.items())] for shard in outputs]
    return hashlib.sha256(json.dumps([_FORMAT, files]).encode()).hexdigest()


def kept_vectors(dataset: DatasetDir, counts: Sequence[tuple[int, int]], num: int) -> NDArray[np.float32]:
    """Returns (N, D) unit embeddings of at most `num` kept images, from evenly chosen shards."""
    per_shard = max(1, -(-num // max(1, len(counts))))
    shards = [shard for shard, _ in counts[:: max(1, len(counts) // num)]]
    chosen = _first_kept(dataset, shards, per_shard)
    found = [unit(_vectors(dataset, *each)) for each in chosen.items()]
    return np.concatenate(found)[:num] if found else np.zeros((0, 1), np.float32)


def _first_kept(dataset: DatasetDir, shards: Sequence[int], num: int) -> dict[int, list[str]]:
    """The first `num` kept uids of each shard, in order; the decisions are read once."""
    query = (
        "SELECT shard, list(uid ORDER BY uid) FROM (FROM read_parquet($decisions) WHERE reason IS NULL "
        "AND shard IN (SELECT unnest($shards)) QUALIFY row_number() OVER (PARTITION BY shard ORDER BY uid) <= $num) "
        "GROUP BY shard ORDER BY shard"
    )
    asked = {"decisions": str(dataset.decisions), "shards": list(shards), "num": num}
    with closing(duckdb.connect()) as connection:
        return dict(connection.execute(query, asked).fetchall())


def _vectors(dataset: DatasetDir, shard: int, uids: Sequence[str]) -> NDArray[np.float16]:
    """The embeddings of these images in order, (N, D), without those that have none."""
    table = read_parquet(dataset.scores(shard), ["uid", "embedding"])
    column = table["embedding"].take(pc.index_in(pa.array(uids, pa.string()), value_set=table["uid"]).drop_null())
    values = column.drop_null().combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, table.schema.field("embedding").type.list_size)
