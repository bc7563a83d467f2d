"""An exact shuffle of any number of rows in bounded memory; the order depends on the seed alone."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sdtrain.dataset.mixing import GAMMA, mix64

_UID_BYTES = 32
Keys = npt.NDArray[np.uint64]
IsSelected = Callable[[pa.Array, Keys], npt.NDArray[np.bool_]]


def shuffle_keys(uids: pa.StringArray, seed: int) -> Keys:
    """A 64-bit number for each uid, as if drawn at random: (B,) uint64. Rows are shuffled by sorting by it.

    Args:
        uids: 32 hexadecimal characters each, none missing.
        seed: another order for each.
    """
    begin, end = uids.offset * _UID_BYTES, (uids.offset + len(uids)) * _UID_BYTES
    words = np.frombuffer(uids.buffers()[2], np.uint8)[begin:end].view("<u8").reshape(-1, _UID_BYTES // 8)
    mixed = np.full(len(uids), seed % 2**64, np.uint64)
    for column in range(words.shape[1]):
        mixed = mix64((mixed ^ words[:, column]) + GAMMA)
    return mixed


@dataclass(frozen=True)
class Bucket:
    """Rows whose keys lie in one range, in shuffled order, each uid once.

    Attributes:
        num_before: rows that came in with these uids, dropped ones included.
        positions: for each row, how many of the rows that came in stand before it.
    """

    rows: pa.Table
    num_before: int
    positions: npt.NDArray[np.int64]


class Shuffle:
    """Rows go in by `add`, in any order and from any thread; buckets come out by `bucket`, in shuffled order.

    Args:
        folder: where rows wait until their bucket is asked for: memory holds a bucket for each thread. (To hold all
            in memory takes longer, for fresh memory costs more than the system's cache of files.)
        num_buckets: more of them are smaller.
        seed: another order for each.
    """

    def __init__(self, folder: Path, num_buckets: int, seed: int) -> None:
        self.num_buckets = num_buckets
        self.seed = seed
        self._files = [_File(folder / f"{number}.arrows") for number in range(num_buckets)]

    def add(self, rows: pa.RecordBatch) -> None:
        """Spreads rows over the buckets. They must have a column `uid`, and the same columns each time."""
        buckets = self._bucket_of(shuffle_keys(rows["uid"], self.seed))
        order = np.argsort(buckets, kind="stable")
        spread = rows.take(pa.array(order))
        ends = np.searchsorted(buckets[order], np.arange(self.num_buckets), side="right")
        begin = 0
        for number, end in enumerate(ends):
            if end > begin:
                self._files[number].append(spread.slice(begin, end - begin))
            begin = end

    def buckets(self, threads: ThreadPoolExecutor, num_ahead: int, is_selected: IsSelected) -> Iterator[Bucket]:
        """All buckets in order, of which some are made ahead of time.

        Args:
            threads: does the work.
            num_ahead: how many buckets may be in memory beside the one in use.
            is_selected: see `bucket`.
        """
        waiting = deque[Future[Bucket]]()
        for number in range(self.num_buckets):
            waiting.append(threads.submit(self.bucket, number, is_selected))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def bucket(self, number: int, is_selected: IsSelected | None = None) -> Bucket:
        """One bucket's rows; of rows with one uid the smallest stays.

        Args:
            number: from 0; a bucket's rows stand before those of the next.
            is_selected: tells which uids, given with their keys in shuffled order, are selected already and so dropped.
        """
        batches = self._files[number].take_all()
        if not batches:
            return Bucket(pa.table({}), 0, np.empty(0, np.int64))
        rows = pa.Table.from_batches(batches).combine_chunks()
        keys = shuffle_keys(rows["uid"].chunk(0), self.seed)
        order, first = _order(rows, keys)
        if is_selected:
            first &= ~is_selected(rows["uid"].chunk(0).take(pa.array(order)), keys[order])
        return Bucket(rows.take(pa.array(order[first])), len(rows), np.flatnonzero(first))

    def _bucket_of(self, keys: Keys) -> npt.NDArray[np.uint16]:
        # The upper 32 bits times the number of buckets: ranges of keys, so that buckets follow one another.
        return (((keys >> np.uint64(32)) * np.uint64(self.num_buckets)) >> np.uint64(32)).astype(np.uint16)


class _File:
    """A bucket's batches on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pa.RecordBatchStreamWriter | None = None
        self._lock = threading.Lock()

    def append(self, rows: pa.RecordBatch) -> None:
        with self._lock:
            if self._writer is None:
                self._writer = pa.ipc.new_stream(str(self._path), rows.schema)
            self._writer.write_batch(rows)

    def take_all(self) -> list[pa.RecordBatch]:
        if self._writer is None:
            return []
        self._writer.close()
        with pa.memory_map(str(self._path)) as file:
            batches = list(pa.ipc.open_stream(file))
        self._path.unlink()
        return batches


def _order(rows: pa.Table, keys: Keys) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The shuffled order of rows, and which of the rows in that order is the first with its uid."""
    order = np.argsort(keys)
    ordered = keys[order]
    same = ordered[1:] == ordered[:-1]
    first = np.ones(len(order), bool)
    if same.any():
        tied = np.flatnonzero(np.r_[same, False] | np.r_[False, same])
        # Rows with one uid have one key; by all columns, so that it does not matter which came first.
        some = rows.take(pa.array(order[tied])).append_column("shuffle key", pa.array(ordered[tied]))
        names = ["shuffle key", "uid", *(name for name in rows.column_names if name != "uid")]
        sorted_ = pc.sort_indices(some, sort_keys=[(name, "ascending") for name in names]).to_numpy()
        order[tied] = order[tied][sorted_]
        uids = some["uid"].take(pa.array(sorted_)).to_numpy()
        first[tied[1:]] = uids[1:] != uids[:-1]
    return order, first
