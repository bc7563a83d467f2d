"""Search for hashes near to a few given ones among very many that pass by in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from filters.dedup.hamming import HASH_BITS, BitTable, Hashes, plan_tables

_PAIRS_AT_ONCE = 1 << 22
_EXTREMES = np.array([0, 2**HASH_BITS - 1], np.uint64)


class Matches(NamedTuple):
    """Pairs (P,): `rows` of a block and `items` of the given hashes."""

    rows: NDArray[np.int64]
    items: NDArray[np.int64]


@dataclass(frozen=True)
class _Sorted:
    """The given hashes in the order of one table: permuted, and their numbers."""

    table: BitTable
    hashes: Hashes
    items: NDArray[np.int64]


class NearHashes:
    """The given 64-bit hashes (M,), which need not be distinct.

    As in `filters.dedup.hamming`, two hashes within the radius agree in some choice of blocks of bits, for each of
    which the M are sorted once. A block of N then costs N searches a table: linear in what passes by, in memory for M.
    """

    def __init__(self, hashes: Hashes, radius: int) -> None:
        self._radius = radius
        planned = np.unique(np.append(hashes, _EXTREMES))  # a plan needs two
        tables = plan_tables(planned, radius) if len(hashes) else []
        self._sorted = [self._in_order(table, hashes) for table in tables]

    def matches(self, block: Hashes) -> Matches:
        """All pairs of a hash of the block (N,) and a given one that differ in at most the radius' bits, each once."""
        none = Matches(np.empty(0, np.int64), np.empty(0, np.int64))
        found = [none, *(piece for given in self._sorted for piece in self._matches_in(given, block))]
        return Matches(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    @staticmethod
    def _in_order(table: BitTable, hashes: Hashes) -> _Sorted:
        permuted = table.permuted(hashes)
        order = np.argsort(permuted, kind="stable")
        return _Sorted(table, permuted[order], order)

    def _matches_in(self, given: _Sorted, block: Hashes) -> list[Matches]:
        permuted = given.table.permuted(block)
        order = np.argsort(permuted)  # searches in order are several times as fast
        permuted = permuted[order]
        rest = np.uint64((1 << (HASH_BITS - given.table.key_bits)) - 1)
        first = np.searchsorted(given.hashes, permuted & ~rest, side="left")
        counts = np.searchsorted(given.hashes, permuted | rest, side="right") - first
        near = (self._near(given, permuted, *some) for some in _expanded(first, counts))
        return [Matches(order[rows], items) for rows, items in near]

    def _near(self, given: _Sorted, block: Hashes, rows: NDArray[np.int64], places: NDArray[np.int64]) -> Matches:
        differing = block[rows] ^ given.hashes[places]
        near = np.bitwise_count(differing) <= self._radius
        rows, places = rows[near], places[near]
        one, other = given.table.restored(block[rows]), given.table.restored(given.hashes[places])
        first = given.table.is_first_for(one ^ other)
        return Matches(rows[first], given.items[places[first]])


def _expanded(first: NDArray[np.int64], counts: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], ...]]:
    """Yields (rows, places) for all `counts` places from `first` on, of each row, in pieces of bounded size.

    A row with more places than a piece has is a piece of its own.
    """
    some = np.flatnonzero(counts)
    ends = np.cumsum(counts[some])
    start = 0
    while start < len(some):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _PAIRS_AT_ONCE, side="right")))
        rows = some[start:stop]
        repeated = np.repeat(first[rows] - (ends[start:stop] - counts[rows] - before), counts[rows])
        yield np.repeat(rows, counts[rows]), repeated + np.arange(len(repeated))
        start = stop
