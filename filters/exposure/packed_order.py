"""Finds samples among packed shards by bisection, as packing sorts by a digest of the uid (`sdtrain.pack.plan`)."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FEW = 200
"""Samples up to which bisection, some reads for each, is worth more than one pass over all shards."""
_END = ("~",)  # after all hexadecimal digests


def shards_holding(shards: Sequence[Path], uids: Sequence[str], seed: int) -> list[Path] | None:
    """The shards that hold the samples, of those numbered in the order of packing with this seed.

    None if a sample is not found so: it may not be there, or shards of two packings lie side by side, and only a look
    into all of them tells. The number of tables read grows with the logarithm of the number of shards.
    """
    shards = sorted(shards, key=lambda path: int(path.stem))  # not by name: from 100,000 on, names are longer

    @cache
    def held_by(number: int) -> pa.ChunkedArray:
        return pq.read_table(shards[number], columns=["uid"])["uid"]

    def first(number: int) -> tuple[str, ...]:
        """The place of a shard's first sample; of an empty shard, that of the next."""
        if number == len(shards):
            return _END
        held = held_by(number)
        return _place(held[0].as_py(), seed) if len(held) else first(number + 1)

    found = {max(0, bisect_right(range(len(shards)), _place(uid, seed), key=first) - 1) for uid in uids}
    held = {uid for number in found for uid in held_by(number).to_pylist()} if shards else set()
    return [shards[number] for number in sorted(found)] if held.issuperset(uids) else None


def _place(uid: str, seed: int) -> tuple[str, ...]:
    return hashlib.md5(f"{uid}{seed}".encode(), usedforsecurity=False).hexdigest(), uid
