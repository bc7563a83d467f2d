"""Records which samples took the place of damaged ones in training (`data.on_corrupt: skip`), and in which steps."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sdtrain.dataset.files import publish
from sdtrain.loading.sample_plan import Ints, SampleIndices

MOST = 1_000_000
"""Rows of one rank's file, of 32 bytes each; later substitutions are not recorded, but the first such step is."""
_BEGUN, _FULL = -1, -2
_ROW = np.dtype("<i8")


class SubstituteLog:
    """One rank's file of rows (step, damaged sample, its epoch, substitute), appended before a step learns from them.

    Opened, it forgets the rows of `first_step` and later, which are made again, and with the first rank those of ranks
    that there are no more. A step in which recording began, or ended for want of room, has a row with -1 or -2 for the
    damaged sample.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, first_step: int, is_kept: bool) -> None:
        """`is_kept`: whether substitutions may come, so that there is a file to be written."""
        self._path, self._lock, self._full_from = _file(folder, rank), threading.Lock(), -1
        for path in folder.glob("rank-*.bin"):
            if path == self._path or (not rank and path.name >= _file(folder, world_size).name):
                _truncate(path, first_step)
        if is_kept:
            folder.mkdir(parents=True, exist_ok=True)
            self._append(np.array([[first_step, _BEGUN, 0, 0]]))

    def add(self, step: int, samples: SampleIndices, substitutes: Mapping[int, int]) -> None:
        """Appends the substitutes, by their positions among the samples, of an optimizer step."""
        rows = [[step, samples.indices[at], samples.epochs[at], number] for at, number in substitutes.items()]
        with self._lock:
            if self._path.stat().st_size // (4 * _ROW.itemsize) + len(rows) <= MOST:
                self._append(np.array(rows))
            elif self._full_from < 0 or step < self._full_from:  # steps are prepared by several threads
                self._full_from = step
                self._append(np.array([[step, _FULL, 0, 0]]))

    def _append(self, rows: Ints) -> None:
        with self._path.open("ab") as file:
            file.write(rows.astype(_ROW).tobytes())


@dataclass(frozen=True)
class Substitutes:
    """All substitutions that a run recorded.

    Attributes:
        rows: (N, 4): step, damaged sample, its epoch, substitute; samples by their numbers.
        recorded_from: the step from which they were recorded; None if they never were.
        full_from: the step from which some are missing; None if all are there.
    """

    rows: Ints
    recorded_from: int | None
    full_from: int | None


def read_substitutes(folder: Path) -> Substitutes:
    """Reads the files of all ranks."""
    rows = np.concatenate([np.empty((0, 4), np.int64), *map(_rows, sorted(folder.glob("rank-*.bin")))])
    begun, full = (rows[rows[:, 1] == kind, 0] for kind in (_BEGUN, _FULL))
    return Substitutes(
        rows[rows[:, 1] >= 0],
        int(begun.min()) if len(begun) else None,
        int(full.min()) if len(full) else None,
    )


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.bin"


def _rows(path: Path) -> NDArray[np.int64]:
    """The whole rows: a killed process may have left part of one."""
    numbers = np.frombuffer(path.read_bytes()[: path.stat().st_size // 32 * 32], _ROW)
    return numbers.reshape(-1, 4).astype(np.int64)


def _truncate(path: Path, step: int) -> None:
    rows = _rows(path)
    with publish(path) as temporary:
        temporary.write_bytes(rows[rows[:, 0] < step].astype(_ROW).tobytes())
