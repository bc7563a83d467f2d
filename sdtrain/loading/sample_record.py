"""Records in a run what its samples' numbers mean, so that they can be told after its datasets have changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sdtrain.config import TrainConfig
from sdtrain.dataset.files import publish, read_parquet
from sdtrain.errors import UserError
from sdtrain.loading.planning import plan_samples
from sdtrain.loading.sample_plan import SamplePlan
from sdtrain.loading.shard_catalog import Shard
from sdtrain.settings import Settings, parse_settings

Stage = Literal["encode", "pack"]
"""Whose shards a run reads: latents, or packed images."""
_SCHEMA = pa.schema(
    [
        ("source", pa.int16()),
        ("table", pa.string()),
        ("digest", pa.binary(32)),
        ("counts", pa.list_(pa.int64())),  # samples of each size
    ]
)
_KEY = b"sdtrain.samples"


class Origin(Settings):
    """The checkpoint whose weights a run began with."""

    run: str
    step: int
    """Optimizer steps done in it."""


class _Described(Settings):
    """The part of the record that does not grow with the shards."""

    stage: Stage
    sizes: tuple[tuple[int, int], ...]
    roots: tuple[str, ...]
    origin: Origin | None = None


@dataclass(frozen=True)
class RecordedSource:
    """One dataset of a run as it was: its shards' tables in order, with their footers' digests, and their counts."""

    root: str
    tables: tuple[str, ...]
    digests: tuple[str, ...]
    counts: NDArray[np.int64]
    """Samples of each size in each shard, (shards, sizes)."""

    @staticmethod
    def of(root: str, shards: Sequence[Shard]) -> RecordedSource:
        """The source as its catalogue lists it."""
        counts = np.array([shard.samples for shard in shards], np.int64)
        return RecordedSource(root, tuple(s.table for s in shards), tuple(s.digest for s in shards), counts)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Table -> its place."""
        return {table: number for number, table in enumerate(self.tables)}

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """The number within the source of each shard's first sample of each size, (shards, sizes)."""
        by_size = self.counts.T.reshape(-1)  # samples are numbered by size, and within a size in the shards' order
        return (np.cumsum(by_size) - by_size).reshape(self.counts.shape[::-1]).T


@dataclass(frozen=True)
class SampleRecord:
    """What the numbers of a run's samples mean.

    Attributes:
        sizes: height and width of the latents.
        origin: None if the run began from scratch or from another model than a run, or did not record it.
    """

    stage: Stage
    sizes: tuple[tuple[int, int], ...]
    sources: tuple[RecordedSource, ...]
    origin: Origin | None = None

    def plan(self, config: TrainConfig) -> SamplePlan:
        """The order in which a run of this config draws the samples."""
        counts = [source.counts for source in self.sources]
        return plan_samples(counts, config, max(1, config.data.bucket_group), config.validation.num_samples)

    def first_of(self, source: int) -> int:
        """The number of a source's first sample."""
        return int(sum(before.counts.sum() for before in self.sources[:source]))

    def write(self, path: Path) -> None:
        """Writes the record: linear in the shards, some 40 bytes for each."""
        roots = tuple(source.root for source in self.sources)
        described = _Described(stage=self.stage, sizes=self.sizes, roots=roots, origin=self.origin)
        columns = {
            "source": np.repeat(np.arange(len(self.sources)), [len(source.tables) for source in self.sources]),
            "table": [table for source in self.sources for table in source.tables],
            "digest": [bytes.fromhex(digest) for source in self.sources for digest in source.digests],
            "counts": [row for source in self.sources for row in source.counts.tolist()],
        }
        table = pa.table(columns, _SCHEMA).replace_schema_metadata({_KEY: described.model_dump_json()})
        with publish(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    @staticmethod
    def read(path: Path) -> SampleRecord | None:
        """The record of a run; None if it has none, UserError if the file is damaged."""
        if not path.exists():
            return None
        try:
            table = read_parquet(path)
            content = json.loads((table.schema.metadata or {})[_KEY])
            described = parse_settings(_Described, content, str(path))
            numbers = table["source"].to_numpy()
            sources = [
                _source(root, table.filter(pa.array(numbers == number))) for number, root in enumerate(described.roots)
            ]
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise UserError(
                f"{path}, which says what the numbers of the run's samples mean, cannot be read: {error}. Delete it: "
                "where the run's datasets have not changed since, it is not needed."
            ) from error
        return SampleRecord(described.stage, described.sizes, tuple(sources), described.origin)


def _source(root: str, rows: pa.Table) -> RecordedSource:
    counts = pc.list_flatten(rows["counts"]).to_numpy().reshape(len(rows), -1)
    digests = tuple(digest.hex() for digest in rows["digest"].to_pylist())
    return RecordedSource(root, tuple(rows["table"].to_pylist()), digests, counts)
