"""Digests, hashes and thumbnails in memory-mapped columns, for more images than memory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdtrain.dataset.progress import report_progress
from sdtrain.mixing import GAMMA, mix64

Words = NDArray[np.uint64]

COLOR_BYTES = 48
_DIGEST_CHARS, _DIGEST_WORDS = 64, 2  # half of a sha256 is enough to tell images apart
_ROWS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Images:
    """All images to compare; node n is the n-th of them.

    `read` yields tables of the given columns, always in the same order. Columns: uid, pixel_sha256, sha256 (of the
    file; null if unknown), phash, thumbnail, and maybe miniature and embedding.
    """

    read: Callable[[Sequence[str]], Iterator[pa.Table]]
    num: int
    has_embeddings: bool = False
    has_miniatures: bool = False


@dataclass(frozen=True)
class Columns:
    """Per-image columns in memory-mapped files in `folder`."""

    folder: Path
    num: int

    def words(self, name: str) -> Words:
        """Returns column `name` (N,): a digest's word ("pixels0", "bytes1"), "hash", or "color", a colour digest."""
        return np.memmap(self.folder / name, np.uint64, "r", shape=(self.num,))

    def colors(self) -> NDArray[np.uint8]:
        """Returns the thumbnails' channel values, (N, 48)."""
        return np.memmap(self.folder / "colors", np.uint8, "r", shape=(self.num, COLOR_BYTES))


def store_columns(images: Images, folder: Path, with_appearance: bool) -> Columns:
    """Writes all images' digests and, with `with_appearance`, hashes and thumbnails."""
    names = ["pixel_sha256", "sha256", *(("phash", "thumbnail") if with_appearance else ())]
    files = dict[str, Any]()
    try:
        for table in report_progress(images.read(names), "dedup: reading", images.num, "images", len):
            for name, values in _arrays(table, with_appearance):
                if name not in files:
                    files[name] = (folder / name).open("wb")
                values.tofile(files[name])
    finally:
        for file in files.values():
            file.close()
    return Columns(folder, images.num)


def in_order(first: Words, second: Words) -> Iterator[tuple[NDArray[np.int64], Words, Words]]:
    """Yields (nodes, first, second): all nodes in order of two words each, with equal words in one piece.

    A piece has about `_ROWS_AT_ONCE` rows unless a value of `first` is more frequent.
    """
    for low, high in _ranges(first):
        nodes = _within(first, low, high)
        ones, others = np.asarray(first[nodes]), np.asarray(second[nodes])
        order = np.lexsort((others, ones))
        yield nodes[order], ones[order], others[order]


def starts_of_runs(ones: Words, others: Words) -> NDArray[np.bool_]:
    """Returns (N,): whether each of the sorted rows differs from the one before."""
    differs = (ones[1:] != ones[:-1]) | (others[1:] != others[:-1])
    return np.concatenate([[True], differs])


def _ranges(values: Words) -> Iterator[tuple[int, int]]:
    """Yields closed ranges of values with about equally many rows."""
    num_parts = -(-len(values) // _ROWS_AT_ONCE)
    sample = np.sort(values[:: max(1, len(values) // (num_parts * 1024))])
    inner = np.unique(sample[:: -(-len(sample) // num_parts)][1:]).tolist()
    lows = [0, *(value for value in inner if value)]
    return zip(lows, [low - 1 for low in lows[1:]] + [2**64 - 1], strict=True)


def _within(values: Words, low: int, high: int) -> NDArray[np.int64]:
    found = [np.empty(0, np.int64)]
    for start in range(0, len(values), _ROWS_AT_ONCE):
        piece = values[start : start + _ROWS_AT_ONCE]
        found.append(start + np.flatnonzero((piece >= np.uint64(low)) & (piece <= np.uint64(high))))
    return np.concatenate(found)


def _arrays(table: pa.Table, with_appearance: bool) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, column in (("pixels", "pixel_sha256"), ("bytes", "sha256")):
        digest = _digest_words(table[column])
        for i in range(_DIGEST_WORDS):
            yield f"{name}{i}", digest[:, i]
    if with_appearance:
        colors = np.frombuffer(b"".join(table["thumbnail"].to_pylist()), np.uint8).reshape(-1, COLOR_BYTES)
        yield "hash", table["phash"].to_numpy().view(np.uint64)
        yield "colors", colors
        yield "color", _mixed(colors.view(np.uint64))


def _digest_words(digests: pa.ChunkedArray) -> Words:
    """Returns (N, 2): the first 128 bits of hex digests; zero for missing ones."""
    known = pc.fill_null(pc.equal(pc.utf8_length(digests), _DIGEST_CHARS), False)
    given = pc.if_else(known, digests, "0" * _DIGEST_CHARS)
    text = pa.chunked_array(given).combine_chunks().cast(pa.binary()).cast(pa.binary(_DIGEST_CHARS))
    chars = np.frombuffer(text.buffers()[1], np.uint8).reshape(-1, _DIGEST_CHARS)[:, : 16 * _DIGEST_WORDS]
    nibbles = (chars & 15) + 9 * (chars >> 6)  # letters' codes have bit 6, digits' do not
    return np.ascontiguousarray(nibbles[:, ::2] << 4 | nibbles[:, 1::2]).view(np.uint64)


def _mixed(words: Words) -> Words:
    """Returns a 64-bit digest of each row, (N,)."""
    mixed = np.zeros(len(words), np.uint64)
    for i in range(words.shape[1]):
        mixed = mix64((mixed + GAMMA) ^ words[:, i])
    return mixed
