"""Search for pairs within a small Hamming distance among very many 64-bit hashes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from filters.dedup.ordering import divide, edges_of, in_threads
from sdtrain.dataset.progress import report_progress

HASH_BITS = 64
Hashes = NDArray[np.uint64]

_ROWS_AT_ONCE, _CHUNK_ROWS = 1 << 19, 1 << 22  # sorted at a time, and divided at a time, 8 bytes each
_ROWS_IN_CACHE = 1 << 16
# Sample for planning a search, and measured costs of its steps in nanoseconds on one core.
_SAMPLE_ROWS, _SAMPLE_TABLES, _MAX_TABLES = 1 << 15, 12, 5000
_ROW_NS, _PAIR_NS = 75.0, 8.0


@dataclass(frozen=True)
class BitTable:
    """A table of a search, which compares hashes that agree in all `key` blocks, (lowest bit, number of bits).

    `rest` are the other blocks; agreement of one in `earlier` would put the pair into an earlier table.
    """

    key: tuple[tuple[int, int], ...]
    rest: tuple[tuple[int, int], ...]
    earlier: tuple[tuple[int, int], ...]

    @property
    def key_bits(self) -> int:
        """The number of bits that must agree."""
        return sum(width for _, width in self.key)

    def permuted(self, hashes: Hashes) -> Hashes:
        """Moves the key's bits to the top, preserving Hamming distances."""
        moved, position = np.zeros(hashes.shape, np.uint64), HASH_BITS
        for low, width in _runs(self.key + self.rest):
            position -= width
            moved |= _bits(hashes, low, width) << np.uint64(position)
        return moved

    def sorted(self, hashes: Hashes) -> Hashes:
        """Returns the permuted hashes in order."""
        values = np.empty(len(hashes), np.uint64)
        for start in range(0, len(hashes), _ROWS_IN_CACHE):
            values[start : start + _ROWS_IN_CACHE] = self.permuted(hashes[start : start + _ROWS_IN_CACHE])
        values.sort()
        return values

    def restored(self, permuted: Hashes) -> Hashes:
        """Inverts `permuted`."""
        hashes, position = np.zeros(permuted.shape, np.uint64), HASH_BITS
        for low, width in _runs(self.key + self.rest):
            position -= width
            hashes |= _bits(permuted, position, width) << np.uint64(low)
        return hashes

    def is_first_for(self, differing: Hashes) -> NDArray[np.bool_]:
        """Returns (N,): whether pairs with these differing bits are in no earlier table."""
        first = np.ones(len(differing), bool)
        for low, width in self.earlier:
            first &= _bits(differing, low, width) != 0
        return first


def near_pairs(hashes: Hashes, radius: int, folder: Path) -> Iterator[tuple[Hashes, Hashes]]:
    """Yields all pairs of hashes that differ in 1 to `radius` bits, each once, in pieces of bounded size.

    Of k blocks of bits, at most `radius` hold a difference, so two near hashes agree in at least k - radius: sorting by
    each choice of k - radius blocks, one table per choice, puts the pair among equal keys (Manku et al., "Detecting
    Near-Duplicates for Web Crawling", WWW 2007). More blocks mean more tables with longer keys; k is chosen for the
    given hashes, so that time grows little faster than their number. `hashes` (N,) are sorted and distinct; if
    they are many, `folder` takes a copy.
    """
    if radius == 0 or len(hashes) < 2:
        return
    tables = plan_tables(hashes, radius)
    counted = report_progress(tables, "dedup: near hashes", len(tables), "tables")
    for block, sharing in groupby(counted, key=lambda table: table.key[0]):
        parts = _divided(hashes, block, folder)
        for table in sharing:
            for values in in_threads(table.sorted, (part for (part,) in parts)):
                for left, right in _near_in_order(values, table.key_bits, radius):
                    one, other = table.restored(left), table.restored(right)
                    first = table.is_first_for(one ^ other)
                    yield one[first], other[first]


def _divided(hashes: Hashes, block: tuple[int, int], folder: Path) -> Iterable[Sequence[Hashes]]:
    """Divides hashes by a block's bits, in a file; about `_ROWS_AT_ONCE` to a part, if not more have one value."""
    if len(hashes) <= _ROWS_AT_ONCE:
        return [[np.asarray(hashes)]]
    sample = _bits(np.asarray(hashes[:: max(1, len(hashes) // _SAMPLE_ROWS)]), *block)
    chunks = ([np.asarray(hashes[start : start + _CHUNK_ROWS])] for start in range(0, len(hashes), _CHUNK_ROWS))
    edges = edges_of(sample, -(-len(hashes) // _ROWS_AT_ONCE))
    return divide(chunks, lambda values: _bits(values, *block), edges, folder)


def plan_tables(hashes: Hashes, radius: int) -> list[BitTable]:
    """Returns the tables that find all pairs within `radius` at the least expected cost."""
    best, least_ns = list[BitTable](), math.inf
    sample = np.asarray(hashes[:: max(1, len(hashes) // _SAMPLE_ROWS)])
    for num_blocks in range(radius + 1, HASH_BITS + 1):
        num_tables = math.comb(num_blocks, radius)
        if best and (num_tables > _MAX_TABLES or num_tables * len(hashes) * _ROW_NS > least_ns):
            break
        tables = _tables(num_blocks, radius)
        share = np.mean([_share_of_pairs(table, sample) for table in tables[:: -(-num_tables // _SAMPLE_TABLES)]])
        cost_ns = num_tables * len(hashes) * (_ROW_NS + float(share) * len(hashes) / 2 * _PAIR_NS)
        if cost_ns < least_ns:
            best, least_ns = tables, cost_ns
    return best


def _tables(num_blocks: int, radius: int) -> list[BitTable]:
    edges = np.linspace(0, HASH_BITS, num_blocks + 1).astype(int).tolist()
    blocks = [(low, high - low) for low, high in pairwise(edges)][::-1]
    tables = []
    for chosen in combinations(range(num_blocks), num_blocks - radius):
        left = [i for i in range(num_blocks) if i not in chosen]
        earlier = tuple(blocks[i] for i in left if i < chosen[-1])
        tables.append(BitTable(tuple(blocks[i] for i in chosen), tuple(blocks[i] for i in left), earlier))
    return tables


def _share_of_pairs(table: BitTable, sample: Hashes) -> float:
    """Returns the share of the sample's pairs that have equal keys."""
    keys = np.sort(table.permuted(sample) >> np.uint64(HASH_BITS - table.key_bits))
    counts = np.diff(np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1], [True]]))).astype(float)
    return float((counts * (counts - 1)).sum() / (len(sample) * (len(sample) - 1)))


def _near_in_order(values: Hashes, key_bits: int, radius: int) -> Iterator[tuple[Hashes, Hashes]]:
    """Yields pairs with equal keys that differ in at most `radius` bits, from sorted values with the key on top."""
    apart = np.uint64(1 << (HASH_BITS - key_bits))
    for start in range(0, len(values) - 1, _ROWS_IN_CACHE):
        piece = values[start : start + _ROWS_IN_CACHE + 1]
        at, distance = start + np.flatnonzero((piece[1:] ^ piece[:-1]) < apart), 1
        # Compares each hash with its n-th right neighbour, for growing n, as long as their keys are equal.
        while len(at):
            differing = values[at] ^ values[at + distance]
            same = differing < apart
            at = at[same]
            close = at[np.bitwise_count(differing[same]) <= radius]
            if len(close):
                yield values[close], values[close + distance]
            distance += 1
            at = at[: np.searchsorted(at, len(values) - distance)]


def _bits(values: Hashes, low: int, width: int) -> Hashes:
    mask = np.uint64((1 << width) - 1)
    return (values >> np.uint64(low)) & mask


def _runs(blocks: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merges each block with the next where that is directly below, keeping the order."""
    runs = [blocks[0]]
    for low, width in blocks[1:]:
        if runs[-1][0] == low + width:
            runs[-1] = (low, width + runs[-1][1])
        else:
            runs.append((low, width))
    return runs
