"""Altered copies: mirrored, cropped or overlaid with a text, as their pixels decide.

Signatures propose pairs (`filters.dedup.proposals`), and a comparison of their miniatures decides
(`filters.dedup.comparison`). `python -m tests.benchmarks.duplicates` prints what is found.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from filters.dedup.columns import Columns, Images
from filters.dedup.comparison import Limits, are_copies
from filters.dedup.proposals import Entries, Pairs, propose
from filters.dedup.signatures import SIGNATURE_BYTES, signatures_of
from filters.dedup.union_find import Components
from sdtrain.dataset.progress import report_progress
from sdtrain.images.miniature import MINIATURE_BYTES, planes_of

_PAIRS_AT_ONCE = 1024
_PROPOSED_AT_ONCE = 1 << 14
_IMAGES_AT_ONCE = 4096


def link_altered(images: Images, columns: Columns, limits: Limits, components: Components) -> None:
    """Links images of which one is an altered copy of the other, or others that connect the same images.

    Needs the column `miniature`. Stores 1.8 kB per image in the columns' folder.
    """
    stored = _store(images, columns)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for plane in stored.planes:
            for pairs in _batched(propose(stored.entries(plane), plane), components):
                pieces = list(_pieces(pairs))
                for piece, copies in zip(pieces, threads.map(partial(stored.are_copies, limits), pieces), strict=True):
                    components.link(piece.ones[copies], piece.others[copies])


@dataclass(frozen=True)
class _Stored:
    """Miniatures and signatures in memory-mapped files; `planes` are the signatures' planes and their views."""

    columns: Columns
    planes: dict[str, tuple[str, ...]]

    def entries(self, plane: str) -> Entries:
        """Returns the signatures of a plane."""
        folder, num = self.columns.folder, self.columns.num
        # As plain arrays, which are quicker in small pieces.
        views = [
            np.asarray(np.memmap(folder / view, np.uint8, "r", shape=(num, SIGNATURE_BYTES)))
            for view in self.planes[plane]
        ]
        known = np.asarray(np.memmap(folder / f"{plane}-known", np.bool_, "r", shape=(num,)))
        return Entries(known, tuple(views), np.asarray(self.columns.words("pixels0")))

    def are_copies(self, limits: Limits, pairs: Pairs) -> NDArray[np.bool_]:
        """Returns (P,): whether the miniatures of each pair are of altered copies.

        Independent of the order of images: the one with the smaller digest is laid on the other.
        """
        first, second = self.columns.words("pixels0"), self.columns.words("pixels1")
        ones, others = pairs.ones, pairs.others
        swapped = (first[ones] > first[others]) | ((first[ones] == first[others]) & (second[ones] > second[others]))
        ones, others = np.where(swapped, others, ones), np.where(swapped, ones, others)
        shape = (self.columns.num, MINIATURE_BYTES)
        miniatures = np.memmap(self.columns.folder / "miniatures", np.uint8, "r", shape=shape)
        return are_copies(planes_of(miniatures[ones]), planes_of(miniatures[others]), pairs.mirrored, limits)


def _store(images: Images, columns: Columns) -> _Stored:
    planes = dict[str, tuple[str, ...]]()
    with ExitStack() as stack:
        files = dict[str, IO[bytes]]()

        def write(name: str, values: NDArray[Any]) -> str:
            if name not in files:
                files[name] = stack.enter_context((columns.folder / name).open("wb"))
            values.tofile(files[name])
            return name

        tables = images.read(["miniature"])
        for table in report_progress(tables, "dedup: miniatures", images.num, "images", len):
            for miniatures in _blocks(table["miniature"]):
                write("miniatures", miniatures)
                for found in signatures_of(planes_of(miniatures)):
                    write(f"{found.plane}-known", found.known)
                    views = {"whole": found.whole, "mirrored": found.mirrored, "center": found.center}
                    planes[found.plane] = tuple(
                        write(f"{found.plane}-{view}", values) for view, values in views.items() if values is not None
                    )
    return _Stored(columns, planes)


def _blocks(column: pa.ChunkedArray) -> Iterator[NDArray[np.uint8]]:
    for chunk in column.chunks:
        values = np.frombuffer(chunk.cast(pa.binary(MINIATURE_BYTES)).buffers()[1], np.uint8)
        rows = values.reshape(-1, MINIATURE_BYTES)[chunk.offset : chunk.offset + len(chunk)]
        for start in range(0, len(rows), _IMAGES_AT_ONCE):
            yield rows[start : start + _IMAGES_AT_ONCE]


def _batched(proposed: Iterator[Pairs], components: Components) -> Iterator[Pairs]:
    """Merges pieces of pairs, without those of images that are linked already."""
    waiting, num = list[Pairs](), 0
    for pairs in proposed:
        waiting.append(pairs.chosen(components.roots(pairs.ones) != components.roots(pairs.others)))
        num += len(waiting[-1].ones)
        if num >= _PROPOSED_AT_ONCE:
            yield _merged(waiting)
            waiting, num = [], 0
    if num:
        yield _merged(waiting)


def _merged(pieces: list[Pairs]) -> Pairs:
    """Returns each pair once, whichever of its images comes first."""
    ones, others, mirrored = (np.concatenate(values) for values in zip(*pieces, strict=True))
    low, high = np.minimum(ones, others), np.maximum(ones, others)
    order = np.lexsort((mirrored, high, low))
    in_order = low[order], high[order], mirrored[order]
    new = np.concatenate([[True], np.any([values[1:] != values[:-1] for values in in_order], axis=0)])
    return Pairs(*in_order).chosen(new)


def _pieces(pairs: Pairs) -> Iterator[Pairs]:
    for start in range(0, len(pairs.ones), _PAIRS_AT_ONCE):
        yield pairs.chosen(slice(start, start + _PAIRS_AT_ONCE))
