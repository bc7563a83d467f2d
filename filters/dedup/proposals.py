"""Proposes pairs of images with similar signatures, at a cost in proportion to the number of images.

As in `filters.dedup.hamming`, tables sort signatures by a part of their bits and compare those with equal keys. Altered
copies differ in more bits than an exhaustive search could cover, so tables find a pair with some chance each; there are
as many as make misses rare, and no two share more than one byte of their keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from filters.dedup.columns import Words
from filters.dedup.signatures import SIGNATURE_BYTES, Signatures
from sdtrain.dataset.progress import report_progress

# The differences of these four are distinct modulo 16, so two tables share at most one byte of their keys.
_KEY_BYTES, _NUM_TABLES = (0, 1, 3, 7), SIGNATURE_BYTES
_MIN_KEY_BITS, _MAX_KEY_BITS = 20, 32
_MAX_DIFFERING_BITS = 20
# Of a key with more signatures than this, each is compared with this many that follow in the order of the other bits.
_MAX_NEIGHBOURS = 64
_ROWS_AT_ONCE = 1 << 25
_ROWS_IN_CACHE = 1 << 18

Nodes = NDArray[np.int64]


class Pairs(NamedTuple):
    """Images `ones` and `others`, (P,), and whether one resembles the other's mirror image, `mirrored`."""

    ones: Nodes
    others: Nodes
    mirrored: NDArray[np.bool_]

    def chosen(self, rows: NDArray[np.bool_ | np.intp] | slice) -> Pairs:
        """Returns some of the pairs."""
        return Pairs(self.ones[rows], self.others[rows], self.mirrored[rows])


@dataclass(frozen=True)
class Entries:
    """Signatures of one plane of N images, and how they were seen.

    Attributes:
        known: which images have signatures, (N,).
        views: (N, 16) each: of the whole, the mirror image and, if there is one, the centre.
        ties: decides the order of equal signatures, (N,).
    """

    known: NDArray[np.bool_]
    views: tuple[Signatures, ...]
    ties: Words

    @property
    def num(self) -> int:
        """The number of images."""
        return len(self.known)


def propose(entries: Entries, plane: str) -> Iterator[Pairs]:
    """Yields pairs whose signatures are similar in some view, in pieces of bounded size.

    A pair comes once for each two views. A whole is compared with wholes, mirror images and centres, a mirror image
    with centres too. The pairs do not depend on the order of images.
    """
    num_bits = key_bits(entries.num)
    tables = range(_NUM_TABLES)
    for table in report_progress(tables, f"dedup: altered, {plane}", _NUM_TABLES, "tables"):
        for rows in _sorted_parts(entries, table, num_bits):
            for ones, others in _neighbours(entries, rows):
                yield _similar(entries, ones, others, table, num_bits)


def key_bits(num: int) -> int:
    """Returns the length of keys with which random signatures of `num` images have few equals."""
    return min(_MAX_KEY_BITS, max(_MIN_KEY_BITS, num.bit_length() + 4))


def _keys(signatures: Signatures, table: int, num_bits: int) -> Words:
    keys = np.zeros(len(signatures), np.uint64)
    for offset in _KEY_BYTES:
        keys = keys << np.uint64(8) | signatures[:, (table + offset) % SIGNATURE_BYTES]
    return keys >> np.uint64(32 - num_bits)


def _sorted_parts(entries: Entries, table: int, num_bits: int) -> Iterator[Words]:
    """Yields rows, key above entry number (view times images plus image), in order; a key is in one part."""
    part_bits = max(0, (len(entries.views) * entries.num - 1) // _ROWS_AT_ONCE).bit_length()
    for part in range(1 << part_bits):
        pieces = [np.empty(0, np.uint64)]
        for view, signatures in enumerate(entries.views):
            for start in range(0, entries.num, _ROWS_IN_CACHE):
                keys = _keys(signatures[start : start + _ROWS_IN_CACHE], table, num_bits)
                wanted = entries.known[start : start + _ROWS_IN_CACHE]
                if part_bits:
                    wanted = wanted & (keys >> np.uint64(num_bits - part_bits) == part)
                at = np.flatnonzero(wanted)
                pieces.append(keys[at] << np.uint64(32) | (at + (view * entries.num + start)).astype(np.uint64))
        rows = np.concatenate(pieces)
        del pieces
        rows.sort()
        yield _crowds_in_order(entries, rows)


def _crowds_in_order(entries: Entries, rows: Words) -> Words:
    """Orders the entries of keys that have too many to compare all with all by their other bits."""
    keys = rows >> np.uint64(32)
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(rows) else np.empty(0, np.int64)
    sizes = np.diff(np.append(starts, len(rows)))
    crowded = np.repeat(sizes > _MAX_NEIGHBOURS, sizes)
    if not crowded.any():
        return rows
    chosen = rows[crowded]
    view, node = _split(entries, chosen)
    first, second = _words(entries, view, node).T
    rows[crowded] = chosen[np.lexsort((view, entries.ties[node], second, first, chosen >> np.uint64(32)))]
    return rows


def _neighbours(entries: Entries, rows: Words) -> Iterator[tuple[Words, Words]]:
    """Yields rows with equal keys, each with the next ones."""
    for start in range(0, len(rows) - 1, _ROWS_IN_CACHE):
        piece = rows[start : start + _ROWS_IN_CACHE + 1] >> np.uint64(32)
        at, distance = start + np.flatnonzero(piece[1:] == piece[:-1]), 1
        found = list[tuple[Words, Words]]()
        while len(at) and distance <= _MAX_NEIGHBOURS:
            same = (rows[at] ^ rows[at + distance]) >> np.uint64(32) == 0
            at = at[same]
            found.append((rows[at], rows[at + distance]))
            distance += 1
            at = at[: np.searchsorted(at, len(rows) - distance)]
            if sum(len(ones) for ones, _ in found) >= _ROWS_IN_CACHE or not len(at) or distance > _MAX_NEIGHBOURS:
                yield np.concatenate([ones for ones, _ in found]), np.concatenate([others for _, others in found])
                found = []


def _similar(entries: Entries, rows: Words, other_rows: Words, table: int, num_bits: int) -> Pairs:
    """Returns the pairs that are near in all bits and in no earlier table."""
    views, nodes = _split(entries, rows)
    other_views, other_nodes = _split(entries, other_rows)
    # Two mirror images, or two centres, are as similar as the wholes are.
    compared = (nodes != other_nodes) & ((views != other_views) | (views == 0))
    views, nodes, other_views, other_nodes = (v[compared] for v in (views, nodes, other_views, other_nodes))
    differing = _words(entries, views, nodes) ^ _words(entries, other_views, other_nodes)
    counts = np.bitwise_count(differing)
    near = np.flatnonzero(counts[:, 0] + counts[:, 1] <= _MAX_DIFFERING_BITS)
    for earlier in range(table):
        near = near[_keys(differing[near].view(np.uint8), earlier, num_bits) != 0]
    mirrored = (views == 1) != (other_views == 1)
    return Pairs(nodes, other_nodes, mirrored).chosen(near)


def _split(entries: Entries, rows: Words) -> tuple[Nodes, Nodes]:
    views, nodes = np.divmod((rows & np.uint64(0xFFFFFFFF)).astype(np.int64), entries.num)
    return views, nodes


def _words(entries: Entries, views: Nodes, nodes: Nodes) -> Words:
    found = np.empty(len(nodes), np.complex128)  # of 16 bytes, as a signature is: rows are copied whole
    for view, signatures in enumerate(entries.views):
        chosen = np.flatnonzero(views == view)
        found[chosen] = signatures.view(np.complex128)[:, 0][nodes[chosen]]
    return found.view(np.uint64).reshape(-1, SIGNATURE_BYTES // 8)
