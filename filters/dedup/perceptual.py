"""Near-duplicates: close perceptual hashes and matching colours.

Finds rescaled and recompressed duplicates, about half of those with a watermark or a 5 % crop, and no mirrored or
recoloured ones: `python -m tests.benchmarks.duplicates` prints the table. `filters.dedup.altered` finds most others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from filters.dedup.columns import Columns
from filters.dedup.hamming import near_pairs
from filters.dedup.ordering import Rows, Words, divide_rows, in_threads
from filters.dedup.union_find import Components, Nodes

# Largest difference (0 to 255) between duplicates' 4x4 colour thumbnails. The perceptual hash sees brightness only, so
# a red and a blue disc hash alike; recompressed and resized duplicates differ by 3 or less.
MAX_COLOR_DIFFERENCE = 16

_CELL = MAX_COLOR_DIFFERENCE + 1
_ROW = 256 // _CELL + 2  # more than the cells, so that neighbours never wrap into the next row
_PLACES = np.array([1, _ROW, _ROW * _ROW])
_NEIGHBOURS = [int(np.dot(_PLACES, steps)) for steps in product((-1, 0, 1), repeat=len(_PLACES))]

Colors = NDArray[np.uint8]
Pairs = tuple[Nodes, Nodes]
Confirm = Callable[[Nodes, Nodes], Iterable[Pairs]]
"""Yields those of some pairs that are duplicates."""


def confirm_all(ones: Nodes, others: Nodes) -> Iterable[Pairs]:
    """Takes hashes and colours at their word."""
    return [(ones, others)]


def agree(colors: Colors, others: Colors) -> NDArray[np.bool_]:
    """Returns (...): whether thumbnails (..., C) are within the largest difference in every channel."""
    difference = np.maximum(colors, others) - np.minimum(colors, others)
    within: NDArray[np.bool_] = difference.max(axis=-1, initial=0) <= MAX_COLOR_DIFFERENCE
    return within


def seeds_of(colors: Colors) -> NDArray[np.int64]:
    """Returns a seed for each thumbnail, (N,), shared by its connected component of agreeing thumbnails.

    Each visited thumbnail takes those that agree with it, which are not compared again.
    """
    waiting, seeds = _Waiting(colors), np.full(len(colors), -1)
    for seed in range(len(colors)):
        if seeds[seed] >= 0:
            continue
        reached, seeds[seed] = [seed], seed
        while reached:
            taken = waiting.take_agreeing(reached.pop())
            new = taken[seeds[taken] < 0]
            seeds[new] = seed
            reached += new.tolist()
    return seeds


class _Waiting:
    """Thumbnails binned by the three most variable channels: those that agree are in one cell or neighbouring ones."""

    def __init__(self, colors: Colors) -> None:
        self._colors = colors
        channels = np.argsort(np.ptp(colors, axis=0), kind="stable")[-len(_PLACES) :]
        self._keys = colors[:, channels].astype(np.int64) // _CELL @ _PLACES
        order = np.argsort(self._keys, kind="stable")
        rows = np.split(order, 1 + np.flatnonzero(np.diff(self._keys[order])))
        self._cells = {int(self._keys[some[0]]): some for some in rows if len(some)}

    def take_agreeing(self, row: int) -> NDArray[np.int64]:
        """Removes and returns the remaining thumbnails that agree with `row`."""
        taken, key = [np.empty(0, np.int64)], int(self._keys[row])
        for cell in (key + step for step in _NEIGHBOURS):
            rows = self._cells.get(cell)
            if rows is None:
                continue
            same = agree(self._colors[rows], self._colors[row])
            if same.any():
                taken.append(rows[same])
                self._cells[cell] = rows[~same]
                if same.all():
                    del self._cells[cell]
        return np.concatenate(taken)


_CHUNK_PAIRS = 1 << 20
_LARGE_RUN = 64


class Appearances(NamedTuple):
    """Distinct pairs of hash and colours, ordered by hash, memory-mapped: one image per pair in `nodes`.

    `starts` are the positions at which each of the distinct `hashes` begins in `nodes`, and the end.
    """

    nodes: NDArray[np.int64]
    hashes: Words
    starts: NDArray[np.int64]


def link_near_duplicates(columns: Columns, radius: int, components: Components, confirm: Confirm = confirm_all) -> None:
    """Links images with hashes within `radius` and agreeing colours, or others that connect the same images.

    `confirm` decides on pairs of which both agree, other than those of equal hash and equal colours.

    Blank images hash alike whatever their colour, and number thousands. So images of equal hash and colours link to the
    first of them, the only one compared further; linked images with one hash are not compared again; and only distinct
    hashes are compared bit by bit, and by colour only if not linked yet.
    """
    colors = columns.colors()
    appearances = _store_appearances(columns, components)
    link = partial(_link_agreeing, colors, components, confirm)
    _link_equal_hashes(appearances, colors, link)
    for ones, others in _batched(near_pairs(appearances.hashes, radius, columns.folder)):
        one, other = np.searchsorted(appearances.hashes, ones), np.searchsorted(appearances.hashes, others)
        for left, right in _products(appearances.starts, one, other):
            link(appearances.nodes[left], appearances.nodes[right])


def _store_appearances(columns: Columns, components: Components) -> Appearances:
    """Links images with equal hash and colours, and writes the first of each in hash order."""
    folder, num = columns.folder, 0
    names = [folder / name for name in ("look_nodes", "look_hashes", "look_starts")]
    with names[0].open("wb") as node_file, names[1].open("wb") as hash_file, names[2].open("wb") as start_file:
        pieces = divide_rows(columns.words("hash"), columns.words("color"), folder)
        for rows in in_threads(Rows.in_order, pieces):
            starts = rows.starts_of_runs()
            first = _first_by_content(columns, rows.nodes, starts)
            same = first[np.cumsum(starts) - 1]
            components.link(same[same != rows.nodes], rows.nodes[same != rows.nodes])
            distinct, begins = _runs(rows.first[starts])
            first.tofile(node_file)
            distinct.tofile(hash_file)
            (begins + num).tofile(start_file)
            num += len(first)
        np.array([num]).tofile(start_file)
    return Appearances(
        *(_mapped(path, kind) for path, kind in zip(names, (np.int64, np.uint64, np.int64), strict=True))
    )


def _first_by_content(columns: Columns, nodes: NDArray[np.int64], starts: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Returns one of each run of nodes, the one with the smallest digest, whatever the order of images."""
    first, runs = nodes[starts], np.cumsum(starts) - 1
    repeated = np.flatnonzero(np.bincount(runs)[runs] > 1) if len(nodes) else np.empty(0, np.int64)
    digests = columns.words("pixels0")[nodes[repeated]]
    order = repeated[np.lexsort((digests, runs[repeated]))]
    begins = np.flatnonzero(np.diff(runs[order], prepend=-1))
    first[runs[order[begins]]] = nodes[order[begins]]
    return first


def _runs(in_order: Words) -> tuple[Words, NDArray[np.int64]]:
    """Returns the distinct values and where each begins."""
    begins = np.flatnonzero(np.diff(in_order, prepend=~in_order[:1]))
    return in_order[begins], begins


def _mapped(path: Path, kind: type) -> NDArray:
    return np.memmap(path, kind, "r")


def _link_equal_hashes(appearances: Appearances, colors: Colors, link: Callable[..., None]) -> None:
    """Links images with one hash: pairwise for most hashes, by `seeds_of` for frequent ones."""
    for start in range(0, len(appearances.hashes), _CHUNK_PAIRS):
        counts = np.diff(appearances.starts[start : start + _CHUNK_PAIRS + 1])
        few = start + np.flatnonzero((counts > 1) & (counts <= _LARGE_RUN))
        for left, right in _products(appearances.starts, few, few):
            upper = left < right
            link(appearances.nodes[left[upper]], appearances.nodes[right[upper]])
        for run in (start + np.flatnonzero(counts > _LARGE_RUN)).tolist():
            nodes = appearances.nodes[appearances.starts[run] : appearances.starts[run + 1]]
            link(nodes, nodes[seeds_of(colors[nodes])], agree_already=True)


def _link_agreeing(
    colors: Colors, components: Components, confirm: Confirm, ones: Nodes, others: Nodes, agree_already: bool = False
) -> None:
    apart = components.roots(ones) != components.roots(others)
    ones, others = ones[apart], others[apart]
    if not agree_already:
        same = agree(colors[ones], colors[others])
        ones, others = ones[same], others[same]
    for pairs in confirm(ones, others):
        components.link(*pairs)


def _products(starts: Nodes, ones: Nodes, others: Nodes) -> Iterator[tuple[Nodes, Nodes]]:
    """Yields bounded pieces of all positions of each hash paired with all of its counterpart in `others`."""
    widths = starts[others + 1] - starts[others]
    sizes = (starts[ones + 1] - starts[ones]) * widths
    ends = np.cumsum(sizes)
    for low in range(0, int(ends[-1]) if len(ends) else 0, _CHUNK_PAIRS):
        flat = np.arange(low, min(low + _CHUNK_PAIRS, int(ends[-1])))
        run = np.searchsorted(ends, flat, side="right")
        row, column = np.divmod(flat - (ends[run] - sizes[run]), widths[run])
        yield starts[ones[run]] + row, starts[others[run]] + column


def _batched(pairs: Iterator[tuple[Words, Words]]) -> Iterator[tuple[Words, Words]]:
    """Merges pieces, since each has a fixed cost."""
    waiting, num = list[tuple[Words, Words]](), 0
    for piece in pairs:
        waiting.append(piece)
        num += len(piece[0])
        if num >= _CHUNK_PAIRS:
            yield np.concatenate([one for one, _ in waiting]), np.concatenate([other for _, other in waiting])
            waiting, num = [], 0
    if num:
        yield np.concatenate([one for one, _ in waiting]), np.concatenate([other for _, other in waiting])
