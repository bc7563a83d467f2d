"""Orders columns of 64-bit words that do not fit into memory, at a cost in proportion to their length."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Nodes = NDArray[np.int64]

_ROWS_AT_ONCE = 1 << 22
_SAMPLE_PER_PART = 1024

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Parts:
    """Columns divided by ranges of a key, in one file a column.

    Each file holds one chunk after another, and each chunk its rows part by part: `starts[c, p]` is where part p of
    chunk c begins, (C, P + 1).
    """

    files: Sequence[tuple[Path, type]]
    starts: Nodes

    def __iter__(self) -> Iterator[list[NDArray[Any]]]:
        """Yields each part's rows of all columns, in the rows' first order; parts in order of their keys."""
        mapped = [np.memmap(path, kind, "r") for path, kind in self.files]
        for part in range(self.starts.shape[1] - 1):
            pieces = self.starts[:, part : part + 2].tolist()
            yield [np.concatenate([values[low:high] for low, high in pieces]) for values in mapped]


def divide(chunks: Iterable[Sequence[NDArray[Any]]], key: Callable[[Any], Words], edges: Words, folder: Path) -> Parts:
    """Divides columns into parts, where `key` of the first column reaches the next of the sorted `edges`.

    `chunks` are pieces of the columns; the files, named `part-0` and so on, replace those of an earlier division.
    """
    ends, starts, kinds = 0, list[Nodes](), list[type]()
    with ExitStack() as stack:
        for columns in chunks:
            part_of = np.searchsorted(edges, key(columns[0]), side="right").astype(np.uint16)
            order = np.argsort(part_of, kind="stable")  # 16 bits are sorted by radix
            sizes = np.bincount(part_of, minlength=len(edges) + 1)
            starts.append(ends + np.concatenate([[0], np.cumsum(sizes)]))
            ends += len(order)
            if not kinds:
                kinds = [values.dtype.type for values in columns]
                files = [stack.enter_context((folder / f"part-{i}").open("wb")) for i in range(len(kinds))]
            for values, file in zip(columns, files, strict=True):
                values[order].tofile(file)
    return Parts([(folder / f"part-{i}", kind) for i, kind in enumerate(kinds)], np.array(starts))


def edges_of(sample: Words, num_parts: int) -> Words:
    """Returns the distinct values that divide a sample into about equal parts; fewer than `num_parts`."""
    in_order = np.sort(sample)
    edges = np.unique(in_order[:: max(1, -(-len(in_order) // num_parts))][1:])
    return edges[edges > 0]


class Rows(NamedTuple):
    """Nodes, and two words of each; all (N,)."""

    nodes: Nodes
    first: Words
    second: Words

    def in_order(self) -> Rows:
        """Returns all rows, ordered by both words and then as they come."""
        packed, row_bits = _packed(self.first)
        order = _row_numbers(packed, row_bits)
        places = _tied(packed, row_bits)
        rows = order[places]
        order[places] = rows[np.lexsort((self.second[rows], self.first[rows]))]
        return self._chosen(order)

    def repeated(self) -> Rows:
        """Returns what `in_order` does, without most of the rows that no other equals."""
        packed, row_bits = _packed(self.first)
        rows = _row_numbers(packed[_tied(packed, row_bits)], row_bits)
        return self._chosen(rows[np.lexsort((self.second[rows], self.first[rows]))])

    def starts_of_runs(self) -> NDArray[np.bool_]:
        """Returns (N,): whether each of the rows, which are in order, differs from the one before."""
        starts = np.ones(len(self.nodes), bool)
        starts[1:] = (self.first[1:] != self.first[:-1]) | (self.second[1:] != self.second[:-1])
        return starts

    def _chosen(self, order: Nodes) -> Rows:
        return Rows(self.nodes[order], self.first[order], self.second[order])


def divide_rows(first: Words, second: Words, folder: Path) -> Iterator[Rows]:
    """Yields rows of two columns by ranges of `first`, with equal words in one piece.

    A piece has about `_ROWS_AT_ONCE` rows unless a value of `first` is more frequent. More rows than that are divided
    in files in `folder`, 24 bytes each.
    """
    num_parts = -(-len(first) // _ROWS_AT_ONCE)
    if num_parts > 1:
        edges = edges_of(first[:: max(1, len(first) // (num_parts * _SAMPLE_PER_PART))], num_parts)
        for ones, nodes, others in divide(_chunks(first, second), lambda words: words, edges, folder):
            yield Rows(nodes, ones, others)
    else:
        yield Rows(np.arange(len(first)), np.asarray(first), np.asarray(second))


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yields the results in the order of the items, of which few more than there are processors are in memory."""
    num = len(os.sched_getaffinity(0))
    waiting = deque[Future[Result]]()
    with ThreadPoolExecutor(num) as threads:
        for item in items:
            waiting.append(threads.submit(work, item))
            if len(waiting) > num:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _chunks(first: Words, second: Words) -> Iterator[tuple[Words, Nodes, Words]]:
    for start in range(0, len(first), _ROWS_AT_ONCE):
        ones = np.asarray(first[start : start + _ROWS_AT_ONCE])
        yield ones, np.arange(start, start + len(ones)), np.asarray(second[start : start + _ROWS_AT_ONCE])


def _packed(words: Words) -> tuple[Words, int]:
    """Returns the words' upper bits above their row numbers, sorted, and the number of bits of the latter.

    Plain numbers are sorted three times as fast as indices of words.
    """
    row_bits = max(1, (len(words) - 1).bit_length())
    lowest = words.min() if len(words) else np.uint64(0)
    spread_bits = int(words.max() - lowest).bit_length() if len(words) else 0
    dropped = np.uint64(max(0, spread_bits + row_bits - 64))
    packed = ((words - lowest) >> dropped) << np.uint64(row_bits) | np.arange(len(words), dtype=np.uint64)
    packed.sort()
    return packed, row_bits


def _row_numbers(packed: Words, row_bits: int) -> Nodes:
    return (packed & np.uint64((1 << row_bits) - 1)).astype(np.int64)


def _tied(packed: Words, row_bits: int) -> Nodes:
    """Returns the places in `packed` with upper bits like a neighbour's."""
    same = (packed[1:] ^ packed[:-1]) >> np.uint64(row_bits) == 0
    tied = np.zeros(len(packed), bool)
    tied[1:] |= same
    tied[:-1] |= same
    return np.flatnonzero(tied)
