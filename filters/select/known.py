"""Uids that are selected already, found again by shuffle key without reading all of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from filters.select.shuffle import Keys, shuffle_keys


class KnownUids:
    """The uids of finished selections, each a sequence of files in shuffled order.

    Args:
        selections: the files of each selection, which the same seed has shuffled.
        seed: that one.
    """

    def __init__(self, selections: Sequence[Sequence[Path]], seed: int) -> None:
        self._selections = [files for files in selections if files]
        self._seed = seed
        self._first_key = lru_cache(maxsize=None)(self._read_first_key)

    def are_known(self, uids: pa.Array, keys: Keys) -> npt.NDArray[np.bool_]:
        """Which of `uids`, given with their keys in shuffled order, have been selected: (B,) bool."""
        known = np.zeros(len(uids), bool)
        if not len(uids):
            return known
        for files in self._selections:
            begin = max(0, bisect_right(files, int(keys[0]) - 1, key=self._first_key) - 1)
            end = bisect_right(files, int(keys[-1]), key=self._first_key)
            for file in files[begin:end]:
                known |= pc.is_in(uids, pq.read_table(file, columns=["uid"])["uid"]).to_numpy(zero_copy_only=False)
        return known

    def _read_first_key(self, file: Path) -> int:
        first = next(pq.ParquetFile(file).iter_batches(batch_size=1, columns=["uid"]), None)
        if first is None:  # all of it was removed: it stands before the next one, wherever that begins
            following = next(files[files.index(file) + 1 :] for files in self._selections if file in files)
            return self._first_key(following[0]) if following else 2**64 - 1
        return int(shuffle_keys(first["uid"], self._seed)[0])
