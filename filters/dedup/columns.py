"""Columns of digests, hashes and thumbnails in memory-mapped files, for more images than memory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sdtrain.dataset.mixing import GAMMA, mix64
from sdtrain.dataset.progress import report_progress

Words = NDArray[np.uint64]

COLOR_BYTES = 48
_DIGEST_CHARS, _DIGEST_WORDS = 64, 2  # half of a sha256 is enough to tell images apart
_ROWS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Images:
    """All images to compare; node n is the n-th of them.

    Attributes:
        read: some columns of all of them, table by table, always in the same order. There are uid, pixel_sha256,
            sha256 (of the file; null where it is not known), phash, thumbnail, and maybe embedding.
        num: how many there are.
        has_embeddings: whether there are any embeddings.
    """

    read: Callable[[Sequence[str]], Iterator[pa.Table]]
    num: int
    has_embeddings: bool = False


@dataclass(frozen=True)
class Columns:
    """Columns of one number an image, as files that are mapped into memory.

    Attributes:
        folder: where they lie.
        num: how many images there are.
    """

    folder: Path
    num: int

    def words(self, name: str) -> Words:
        """(N,) column `name`: a word of a digest ("pixels0", "bytes1"), "hash", or "color", a digest of the colours."""
        return np.memmap(self.folder / name, np.uint64, "r", shape=(self.num,))

    def colors(self) -> NDArray[np.uint8]:
        """(N, 48) channel values of the thumbnails."""
        return np.memmap(self.folder / "colors", np.uint8, "r", shape=(self.num, COLOR_BYTES))


def store_columns(images: Images, folder: Path, with_appearance: bool) -> Columns:
    """Writes the digests, and with `with_appearance` also hashes and thumbnails, of all images."""
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
    """All nodes, ordered by two words each, in pieces; nodes of equal words are in one piece and in order.

    Yields:
        (nodes, first, second): of one piece, about `_ROWS_AT_ONCE` long where no value of `first` is more frequent.
    """
    for low, high in _ranges(first):
        nodes = _within(first, low, high)
        ones, others = np.asarray(first[nodes]), np.asarray(second[nodes])
        order = np.lexsort((others, ones))
        yield nodes[order], ones[order], others[order]


def starts_of_runs(ones: Words, others: Words) -> NDArray[np.bool_]:
    """(N,) whether each of sorted rows differs from the row before."""
    differs = (ones[1:] != ones[:-1]) | (others[1:] != others[:-1])
    return np.concatenate([[True], differs])


def _ranges(values: Words) -> Iterator[tuple[int, int]]:
    """Ranges of values, both ends included, that hold about equally many."""
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
    """(N, 2) the first 128 bits of hex digests; zero where there is none."""
    known = pc.fill_null(pc.equal(pc.utf8_length(digests), _DIGEST_CHARS), False)
    given = pc.if_else(known, digests, "0" * _DIGEST_CHARS)
    text = pa.chunked_array(given).combine_chunks().cast(pa.binary()).cast(pa.binary(_DIGEST_CHARS))
    chars = np.frombuffer(text.buffers()[1], np.uint8).reshape(-1, _DIGEST_CHARS)[:, : 16 * _DIGEST_WORDS]
    nibbles = (chars & 15) + 9 * (chars >> 6)  # the letters' codes have bit 6, the digits' have not
    return np.ascontiguousarray(nibbles[:, ::2] << 4 | nibbles[:, 1::2]).view(np.uint64)


def _mixed(words: Words) -> Words:
    """(N,) a 64-bit digest of each row."""
    mixed = np.zeros(len(words), np.uint64)
    for i in range(words.shape[1]):
        mixed = mix64((mixed + GAMMA) ^ words[:, i])
    return mixed
