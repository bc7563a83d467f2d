"""Computes, instead of storing, the order of samples in an epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sdtrain.mixing import mix64

Ints = NDArray[np.int64]
Shuffle = Callable[[Ints, int, NDArray[np.uint64]], Ints]
"""(numbers in [0, size), size, keys) -> numbers in [0, size): `permute` or `unpermute`."""
_Network = Callable[[NDArray[np.uint64], np.uint64, NDArray[np.uint64]], NDArray[np.uint64]]
_ROUNDS = 8


class Order(Protocol):
    """A permutation of [0, size) for each epoch."""

    @property
    def size(self) -> int:
        """Samples in one epoch."""

    def at(self, epoch: int, offsets: Ints) -> Ints:
        """The samples at the given offsets of an epoch."""

    def find(self, epoch: int, samples: Ints) -> Ints:
        """The offsets of samples in an epoch, the inverse of `at`."""


@dataclass(frozen=True)
class GlobalOrder:
    """A global shuffle: the best mixing, but it reads from all shards all the time.

    `size` counts the samples in one epoch; `name` separates the streams of the run with this `seed`.
    """

    size: int
    seed: int
    name: str = ""

    def at(self, epoch: int, offsets: Ints) -> Ints:
        """The samples at the given offsets of an epoch."""
        return permute(offsets, self.size, self._keys(epoch))

    def find(self, epoch: int, samples: Ints) -> Ints:
        """The offsets of samples in an epoch, the inverse of `at`."""
        return unpermute(samples, self.size, self._keys(epoch))

    def _keys(self, epoch: int) -> NDArray[np.uint64]:
        return round_keys(f"order {self.seed} {epoch}{self.name}")


@dataclass(frozen=True)
class _Layout:
    """One epoch of a BlockOrder: its shards in order, and the starts of each shard and window."""

    shards: Ints
    begins: Ints
    windows: Ints
    keys: NDArray[np.uint64]


class BlockOrder:
    """Reads each shard in one stretch: shuffles the shards, then the samples within each window of consecutive shards.

    A window is the next `window` shards in the epoch's order. So at most `window` shards are open at once (twice as
    many while a batch straddles two windows), and each is opened once an epoch. A window is mixed perfectly; two
    samples of different shards share a window with probability (window - 1) / (number of shards - 1). Packed shards are
    random samples of the whole dataset, hence so is a window.

    `shard_sizes` are in the order of the samples' numbers. `source` separates datasets: the streams of one dataset,
    which `name` separates, visit its shards in the same order.
    """

    def __init__(self, shard_sizes: Ints, window: int, seed: int, source: str = "", name: str = "") -> None:
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._firsts = np.cumsum(self._sizes) - self._sizes
        self._window, self._seed, self._source, self._name = window, seed, source, name
        self.size = int(self._sizes.sum())
        self._layout = lru_cache(maxsize=4)(self._lay_out)

    def at(self, epoch: int, offsets: Ints) -> Ints:
        """The samples at the given offsets of an epoch."""
        layout = self._layout(epoch)
        positions = self._in_windows(epoch, layout, offsets, permute)
        turns = np.searchsorted(layout.begins, positions, side="right") - 1
        return self._firsts[layout.shards[turns]] + positions - layout.begins[turns]

    def find(self, epoch: int, samples: Ints) -> Ints:
        """The offsets of samples in an epoch, the inverse of `at`."""
        layout = self._layout(epoch)
        shards = np.searchsorted(self._firsts, samples, side="right") - 1  # empty shards begin where the next does
        turns = unpermute(shards, len(self._sizes), layout.keys)
        positions = layout.begins[turns] + samples - self._firsts[shards]
        return self._in_windows(epoch, layout, positions, unpermute)

    def _in_windows(self, epoch: int, layout: _Layout, offsets: Ints, shuffle: Shuffle) -> Ints:
        """Applies the permutation of each window, or its inverse, to the offsets in it."""
        windows = np.searchsorted(layout.windows, offsets, side="right") - 1
        shuffled = np.empty_like(offsets)
        for window in np.unique(windows):
            here, begin = windows == window, layout.windows[window]
            end = layout.windows[window + 1] if window + 1 < len(layout.windows) else self.size
            keys = round_keys(f"window {self._seed} {epoch} {window}{self._name}")
            shuffled[here] = begin + shuffle(offsets[here] - begin, int(end - begin), keys)
        return shuffled

    def _lay_out(self, epoch: int) -> _Layout:
        count = len(self._sizes)
        keys = round_keys(f"shards {self._seed} {epoch}{self._source}")
        shards = permute(np.arange(count, dtype=np.int64), count, keys)
        sizes = self._sizes[shards]
        begins = np.cumsum(sizes) - sizes
        return _Layout(shards, begins, begins[:: self._window], keys)


def permute(offsets: Ints, size: int, keys: NDArray[np.uint64]) -> Ints:
    """Image of each offset in [0, size) under a pseudo-random permutation of [0, size).

    A Feistel network permutes the next power of four; results outside [0, size) walk on along their cycle until they
    are inside (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
    """
    return _walk(offsets, size, keys, _feistel)


def unpermute(values: Ints, size: int, keys: NDArray[np.uint64]) -> Ints:
    """The inverse of `permute`: walks the same cycles backwards."""
    return _walk(values, size, keys, _feistel_back)


def _walk(numbers: Ints, size: int, keys: NDArray[np.uint64], network: _Network) -> Ints:
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    values = network(numbers.astype(np.uint64), half_bits, keys)
    while (outside := values >= size).any():
        values[outside] = network(values[outside], half_bits, keys)
    return values.astype(np.int64)


def round_keys(name: str) -> NDArray[np.uint64]:
    """The keys of the permutation with this name."""
    digest = hashlib.blake2b(name.encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, "<u8")


def _feistel(values: NDArray[np.uint64], half_bits: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for key in keys:
        left, right = right, left ^ (mix64(right ^ key) & mask)
    return (left << half_bits) | right


def _feistel_back(values: NDArray[np.uint64], half_bits: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for key in keys[::-1]:
        left, right = right ^ (mix64(left ^ key) & mask), left
    return (left << half_bits) | right
