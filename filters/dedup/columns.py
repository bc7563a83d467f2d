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

from filters.dedup.ordering import Words
from sdtrain.dataset.progress import report_progress
from sdtrain.mixing import GAMMA, mix64

COLOR_BYTES = 48
_DIGEST_CHARS, _DIGEST_WORDS = 64, 2  # half of a sha256 is enough to tell images apart


@dataclass(frozen=True)
class Images:
    """All images to compare; node n is the n-th of them.

    `read` yields tables of the given columns, always in the same order. Columns: uid, pixel_sha256, sha256 (of the
    file; null if unknown), phash, thumbnail, and maybe miniature, embedding (CLIP's) and sscd_embedding.
    """

    read: Callable[[Sequence[str]], Iterator[pa.Table]]
    num: int
    has_embeddings: bool = False
    has_miniatures: bool = False
    has_sscd: bool = False


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


def _arrays(table: pa.Table, with_appearance: bool) -> Iterator[tuple[str, NDArray[Any]]]:
    for name, column in (("pixels", "pixel_sha256"), ("bytes", "sha256")):
        for i, words in enumerate(_digest_words(table[column])):
            yield f"{name}{i}", words
    if with_appearance:
        colors = _rows(table["thumbnail"], COLOR_BYTES)
        yield "hash", table["phash"].to_numpy().view(np.uint64)
        yield "colors", colors
        yield "color", _mixed(colors.view(np.uint64))


def _digest_words(digests: pa.ChunkedArray) -> list[Words]:
    """Returns the first 128 bits of hex digests as two words, (N,) each; zero for missing ones."""
    known = pc.fill_null(pc.equal(pc.utf8_length(digests), _DIGEST_CHARS), False)
    given = digests if pc.all(known).as_py() else pc.if_else(known, digests, "0" * _DIGEST_CHARS)
    chars = _rows(given.cast(pa.binary()), _DIGEST_CHARS).view(np.uint64)
    halves = [_hex_bytes(chars[:, i]) for i in range(2 * _DIGEST_WORDS)]
    return [halves[2 * i] | halves[2 * i + 1] << np.uint64(32) for i in range(_DIGEST_WORDS)]


def _hex_bytes(chars: Words) -> Words:
    """Returns the four bytes that eight hex digits spell, the first digits lowest; all are in one word each."""
    ones = np.uint64(0x0101010101010101)
    # Letters' codes have bit 6, digits' do not.
    nibbles = (chars & np.uint64(15) * ones) + np.uint64(9) * (chars >> np.uint64(6) & ones)
    spread = (nibbles << np.uint64(4) | nibbles >> np.uint64(8)) & np.uint64(0x00FF00FF00FF00FF)
    spread = (spread | spread >> np.uint64(8)) & np.uint64(0x0000FFFF0000FFFF)
    return (spread | spread >> np.uint64(16)) & np.uint64(0xFFFFFFFF)


def _rows(column: pa.ChunkedArray, width: int) -> NDArray[np.uint8]:
    """Returns (N, width): values that all have this many bytes."""
    fixed = pa.chunked_array(column).combine_chunks().cast(pa.binary(width))
    values = np.frombuffer(fixed.buffers()[1], np.uint8).reshape(-1, width)
    return values[fixed.offset : fixed.offset + len(fixed)]


def _mixed(words: Words) -> Words:
    """Returns a 64-bit digest of each row, (N,)."""
    mixed = np.zeros(len(words), np.uint64)
    for i in range(words.shape[1]):
        mixed = mix64((mixed + GAMMA) ^ words[:, i])
    return mixed
