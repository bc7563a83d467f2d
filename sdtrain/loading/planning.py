"""Plans the order of a run's samples from its config and the counts of its datasets' shards, without opening any."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sdtrain.config import TrainConfig
from sdtrain.errors import UserError
from sdtrain.loading.order import BlockOrder, GlobalOrder, Order
from sdtrain.loading.sample_plan import SamplePlan, SourcePlan, whole_shares

Counts = NDArray[np.int64]
"""Samples of each size in each shard of one dataset, (shards, sizes)."""


def plan_samples(counts: Sequence[Counts], config: TrainConfig, group: int, num_held_out: int = 0) -> SamplePlan:
    """Plans the order of samples whose datasets have these counts, in groups of one size.

    The last `num_held_out` samples are in no epoch. UserError if nothing is left to train on.
    """
    shares = whole_shares([source.weight for source in config.data.all_sources])
    counts = [part.copy() for part in counts]
    _hold_out(counts[-1][:, -1], num_held_out)
    is_single = len(counts) == counts[0].shape[1] == 1
    sources = [
        SourcePlan(
            tuple(_order(rows, config, "" if is_single else f" {n} {size}", n) for size, rows in enumerate(part.T)),
            shares[n],
        )
        for n, part in enumerate(counts)
    ]
    return SamplePlan(sources, config.global_batch_size, group)


def digest_of_sources(digests: Sequence[str], weights: Sequence[float]) -> str:
    """The digest of several weighted datasets as one."""
    described = [[digest, weight] for digest, weight in zip(digests, weights, strict=True)]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _order(shard_sizes: Counts, config: TrainConfig, name: str, source: int) -> Order:
    if config.data.shuffle == "global":
        return GlobalOrder(int(shard_sizes.sum()), config.seed, name)
    return BlockOrder(shard_sizes, config.data.window_shards, config.seed, f" {source}", name)


def _hold_out(shard_sizes: Counts, num_samples: int) -> None:
    """Subtracts the last samples from the shards' sizes, in place."""
    if num_samples and num_samples >= shard_sizes.sum():
        raise UserError(
            f"validation.num_samples {num_samples} leaves nothing to train on: there are {shard_sizes.sum()} latents "
            "(of the last size, in the last dataset). Make it smaller."
        )
    ends = np.minimum(np.cumsum(shard_sizes), shard_sizes.sum() - num_samples)
    shard_sizes[:] = np.diff(ends, prepend=0)
