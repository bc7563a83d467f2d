"""Altered copies: mirrored, cropped or overlaid with a text, as their pixels decide.

Signatures propose pairs (`filters.dedup.proposals`), and a comparison of their miniatures decides
(`filters.dedup.comparison`). Pixels also decide on the pairs of near hashes, which are those of one template as often
as of one image. `python -m tests.benchmarks.duplicates` prints what is found.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import IO, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from filters.dedup.columns import Columns, Images
from filters.dedup.comparison import Limits, are_confirmed, are_copies
from filters.dedup.proposals import Entries, Pairs, propose
from filters.dedup.signatures import SIGNATURE_BYTES, signatures_of
from filters.dedup.union_find import Components, Nodes
from sdtrain.dataset.progress import report_progress
from sdtrain.images.miniature import MINIATURE_BYTES, Planes, planes_of

_PAIRS_AT_ONCE = 1024
_PROPOSED_AT_ONCE = 1 << 14
_IMAGES_AT_ONCE = 4096
_MAX_REFUSED = 64


class Miniatures:
    """Miniatures and signatures in memory-mapped files, and what their pixels decide.

    Takes 1.8 kB per image in the columns' folder, and 2 bytes in memory. `planes` are the signatures' planes and their
    views.
    """

    def __init__(self, columns: Columns, limits: Limits, planes: dict[str, tuple[str, ...]]) -> None:
        self.columns, self.limits, self.planes = columns, limits, planes
        self._refused = np.zeros(columns.num, np.uint16)

    @classmethod
    def store(cls, images: Images, columns: Columns, limits: Limits) -> Miniatures:
        """Reads the column `miniature`."""
        return cls(columns, limits, _store(images, columns))

    def link_altered(self, components: Components) -> None:
        """Links images of which one is an altered copy of the other, or others that connect the same images."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            for plane in self.planes:
                for pairs in _batched(propose(self.entries(plane), plane), components):
                    pieces = list(_pieces(pairs))
                    for piece, copies in zip(pieces, threads.map(self.are_copies, pieces), strict=True):
                        components.link(piece.ones[copies], piece.others[copies])

    def confirm(self, ones: Nodes, others: Nodes) -> Iterator[tuple[Nodes, Nodes]]:
        """Yields those of some pairs of images with near hashes whose pixels confirm them.

        An image that was refused often is one of a crowd of one template, and is not compared further: so the cost
        stays in proportion to the number of images.
        """
        pairs = Pairs(ones, others, np.zeros(len(ones), bool))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            for start in range(0, len(ones), _PROPOSED_AT_ONCE):
                waiting = pairs.chosen(slice(start, start + _PROPOSED_AT_ONCE))
                refused = np.maximum(self._refused[waiting.ones], self._refused[waiting.others])
                pieces = list(_pieces(waiting.chosen(refused < _MAX_REFUSED)))
                for piece, equal in zip(pieces, threads.map(self._are_confirmed, pieces), strict=True):
                    yield piece.ones[equal], piece.others[equal]
                    for nodes in (piece.ones[~equal], piece.others[~equal]):
                        np.add.at(self._refused, nodes, 1)

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

    def are_copies(self, pairs: Pairs) -> NDArray[np.bool_]:
        """Returns (P,): whether the miniatures of each pair are of altered copies."""
        return are_copies(*self._laid(pairs), pairs.mirrored, self.limits)

    def _are_confirmed(self, pairs: Pairs) -> NDArray[np.bool_]:
        return are_confirmed(*self._laid(pairs), self.limits)

    def _laid(self, pairs: Pairs) -> tuple[Planes, Planes]:
        """Returns both miniatures of each pair.

        Independent of the order of images: the one with the smaller digest is laid on the other.
        """
        first, second = self.columns.words("pixels0"), self.columns.words("pixels1")
        ones, others = pairs.ones, pairs.others
        swapped = (first[ones] > first[others]) | ((first[ones] == first[others]) & (second[ones] > second[others]))
        ones, others = np.where(swapped, others, ones), np.where(swapped, ones, others)
        shape = (self.columns.num, MINIATURE_BYTES)
        miniatures = np.memmap(self.columns.folder / "miniatures", np.uint8, "r", shape=shape)
        return planes_of(miniatures[ones]), planes_of(miniatures[others])


def _store(images: Images, columns: Columns) -> dict[str, tuple[str, ...]]:
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
    return planes


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
