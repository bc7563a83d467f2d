"""Tells where a shard's samples were before removals: each one renumbers the rows behind those that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Removal:
    """What one removal took out of a table of `num_rows` rows: `rows`, and their `places` in the file of removed rows.

    `before` and `after` are digests of the table.
    """

    before: str
    after: str | None
    num_rows: int
    rows: Ints
    places: Ints


class ShardRows:
    """The samples of one shard's table, now and before each removal.

    A sample is named by its present row, or by -1 - its place in the file of removed rows. `num_rows` and `digest` are
    the table's at present; `removed` are the rows of that file that name this table, and `places` their places in it.
    """

    def __init__(self, num_rows: int, digest: str, removed: pa.Table, places: Ints) -> None:
        self._num_rows, self._digest = num_rows, digest
        self._removals = _removals(removed, places) if len(removed) else []

    def at(self, digest: str) -> Ints | None:
        """The samples' names in the order of the table with this digest; None if that is not known."""
        names, current = np.arange(self._num_rows), self._digest
        for removal in reversed(self._removals):
            if current == digest:
                break
            if removal.after is None and removal.before == current:
                continue  # it was planned, and never begun
            if removal.after != current or removal.num_rows != len(names) + len(removal.rows):
                return None  # the shard was made again in between
            whole = np.empty(removal.num_rows, np.int64)
            is_left = np.ones(removal.num_rows, bool)
            is_left[removal.rows] = False
            whole[is_left], whole[removal.rows] = names, -1 - removal.places
            names, current = whole, removal.before
        return names if current == digest else None


def _removals(removed: pa.Table, places: Ints) -> Sequence[_Removal]:
    found = []
    for number in np.unique(removed["removal"].to_numpy()).tolist():
        here = pc.equal(removed["removal"], number)
        rows = removed.filter(here)
        before, after, num_rows = (rows[name][0].as_py() for name in ("before", "after", "num_rows"))
        numbers, own = rows["row"].to_numpy(), places[here.to_numpy()]
        found.append(_Removal(before, after, num_rows, numbers[numbers >= 0], own[numbers >= 0]))  # but for NO_ROW
    return found


def ranks(kinds: NDArray[np.int64]) -> Ints:
    """For each element, how many before it are equal to it."""
    counted = np.empty(len(kinds), np.int64)
    for kind in np.unique(kinds):
        here = kinds == kind
        counted[here] = np.arange(here.sum())
    return counted
