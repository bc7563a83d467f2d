"""Writing of ordered rows to selection files of exactly N rows with img2dataset's keys; lookup of selected uids."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from filters.select.shuffle import Keys, Order
from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir

_SHARD_DIGITS = 5  # as img2dataset's oom_shard_count


def key_digits(samples_per_shard: int) -> int:
    """Returns the number of digits for the sample index in a shard, as in img2dataset's keys."""
    return math.ceil(math.log10(samples_per_shard))


def shard_key(shard: int, index: int, samples_per_shard: int) -> str:
    """Returns the key of sample `index` in `shard`."""
    digits = key_digits(samples_per_shard)
    return f"{10**digits * shard + index:0{digits + _SHARD_DIGITS}d}"


@dataclass
class ExactShards:
    """Splits rows into shards of exactly N and writes several concurrently, in `threads`, for which `finish` waits.

    At most `max_waiting` shards are in memory at once.
    """

    dataset: DatasetDir
    samples_per_shard: int
    first_shard: int
    threads: ThreadPoolExecutor
    max_waiting: int = 8
    paths: list[Path] = field(default_factory=list)
    _left: list[pa.Table] = field(default_factory=list)
    _num_left: int = 0
    _waiting: deque[Future[None]] = field(default_factory=deque)

    def add(self, rows: pa.Table) -> None:
        """Appends rows; writes every shard that they fill."""
        begin = 0
        while len(rows) - begin >= (missing := self.samples_per_shard - self._num_left):
            self._write([*self._left, rows.slice(begin, missing)])
            self._left, self._num_left = [], 0
            begin += missing
        if begin < len(rows):
            self._left.append(rows.slice(begin))
            self._num_left += len(rows) - begin

    def finish(self) -> list[Path]:
        """Writes the last, short shard; returns the files in order once all have their final names."""
        if self._num_left:
            self._write(self._left)
        _wait(self._waiting)
        return self.paths

    def _write(self, parts: Iterable[pa.Table]) -> None:
        shard = self.first_shard + len(self.paths)
        self.paths.append(self.dataset.selection(shard))
        self._waiting.append(
            self.threads.submit(_write_shard, pa.concat_tables(parts), shard, self.samples_per_shard, self.paths[-1])
        )
        while len(self._waiting) > self.max_waiting:
            self._waiting.popleft().result()


def _wait(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.result()


def _write_shard(rows: pa.Table, shard: int, samples_per_shard: int, path: Path) -> None:
    digits = key_digits(samples_per_shard)
    numbers = pa.array(10**digits * shard + np.arange(len(rows)))
    keys = pc.utf8_lpad(numbers.cast(pa.string()), digits + _SHARD_DIGITS, "0")
    with publish(path) as temporary:
        # Dictionaries and statistics do not help with distinct strings in random order.
        pq.write_table(
            rows.add_column(0, "key", keys),
            temporary,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
            row_group_size=samples_per_shard,
        )


class SelectedUids:
    """The uids of finished selections, each a sequence of files in that order."""

    def __init__(self, selections: Sequence[Sequence[Path]], order: Order) -> None:
        self._selections = [files for files in selections if files]
        self._order = order
        self._first_key = lru_cache(maxsize=None)(self._read_first_key)

    def are_selected(self, uids: pa.Array, keys: Keys) -> npt.NDArray[np.bool_]:
        """Returns (B,): whether each of `uids`, with its key in shuffled order, is already selected."""
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
        first = next(pq.ParquetFile(file).iter_batches(batch_size=1, columns=["uid", "url"]), None)
        if first is None:  # all its rows were removed: treat it as beginning where the next one does
            following = next(files[files.index(file) + 1 :] for files in self._selections if file in files)
            return self._first_key(following[0]) if following else 2**64 - 1
        return int(self._order.keys(first)[0])
