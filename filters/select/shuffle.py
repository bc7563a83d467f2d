"""An exact shuffle of any number of rows in bounded memory, whose order depends on the seed alone."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sdtrain.mixing import GAMMA, mix64

_UID_BYTES = 32
Keys = npt.NDArray[np.uint64]
IsSelected = Callable[[pa.Array, Keys], npt.NDArray[np.bool_]]


def shuffle_keys(uids: pa.StringArray, seed: int) -> Keys:
    """Returns a pseudorandom uint64 per uid (32 hexadecimal characters), (B,); sorting by it shuffles the rows."""
    begin, end = uids.offset * _UID_BYTES, (uids.offset + len(uids)) * _UID_BYTES
    words = np.frombuffer(uids.buffers()[2], np.uint8)[begin:end].view("<u8").reshape(-1, _UID_BYTES // 8)
    mixed = np.full(len(uids), seed % 2**64, np.uint64)
    for column in range(words.shape[1]):
        mixed = mix64((mixed ^ words[:, column]) + GAMMA)
    return mixed


def url_keys(urls: pa.StringArray, seed: int) -> Keys:
    """Returns a pseudorandom uint64 per URL, (B,), from its md5."""
    digests = (hashlib.md5(url.encode(), usedforsecurity=False).digest()[:8] for url in urls.to_pylist())
    return mix64((np.frombuffer(b"".join(digests), "<u8") ^ np.uint64(seed % 2**64)) + GAMMA)


@dataclass(frozen=True)
class Order:
    """The shuffled order: of rows, or of URLs, whose rows come together, by uid."""

    seed: int
    by: Literal["uid", "url"] = "uid"

    def keys(self, rows: pa.RecordBatch) -> Keys:
        """Returns a uint64 per row, (B,); rows are in order by key and uid."""
        return url_keys(rows["url"], self.seed) if self.by == "url" else shuffle_keys(rows["uid"], self.seed)


@dataclass(frozen=True)
class SourceOrder(Order):
    """The order of an imported source, whose tars and tables are then read from front to back; `pack` shuffles."""

    last_row: int = 0

    def keys(self, rows: pa.RecordBatch) -> Keys:
        """Returns uint64s in the order of column `source_row`, spread over the whole range."""
        scale = np.uint64((2**64 - 1) // (self.last_row + 1))
        return rows["source_row"].to_numpy().astype(np.uint64) * scale


@dataclass(frozen=True)
class Bucket:
    """Rows of one key range in shuffled order, each uid once.

    `num_before` counts input rows with these uids, dropped ones included; `positions`, for each row, those before it.
    """

    rows: pa.Table
    num_before: int
    positions: npt.NDArray[np.int64]


class Shuffle:
    """An out-of-core shuffle: `add` takes rows in any order from any thread, `bucket` returns them in shuffled order.

    Rows wait on disk in `folder`, so memory holds one bucket per thread. (Holding all in memory takes longer, because
    fresh memory costs more than the system's file cache.) More buckets are smaller ones.
    """

    def __init__(self, folder: Path, num_buckets: int, order: Order) -> None:
        self.num_buckets = num_buckets
        self.order = order
        self._files = [_File(folder / f"{number}.arrows") for number in range(num_buckets)]

    def add(self, rows: pa.RecordBatch) -> None:
        """Distributes rows, which need columns `uid` and `url` and the same columns each time, over the buckets."""
        buckets = self._bucket_of(self.order.keys(rows))
        order = np.argsort(buckets, kind="stable")
        spread = rows.take(pa.array(order))
        ends = np.searchsorted(buckets[order], np.arange(self.num_buckets), side="right")
        begin = 0
        for number, end in enumerate(ends):
            if end > begin:
                self._files[number].append(spread.slice(begin, end - begin))
            begin = end

    def buckets(self, threads: ThreadPoolExecutor, num_ahead: int, is_selected: IsSelected) -> Iterator[Bucket]:
        """Yields all buckets in order, preparing up to `num_ahead` beyond the current one on `threads`."""
        waiting = deque[Future[Bucket]]()
        for number in range(self.num_buckets):
            waiting.append(threads.submit(self.bucket, number, is_selected))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def bucket(self, number: int, is_selected: IsSelected | None = None) -> Bucket:
        """Returns bucket `number`; of rows with one uid the smallest stays.

        Buckets follow one another in shuffled order. Drops uids that `is_selected`, given uids and keys, reports.
        """
        batches = self._files[number].take_all()
        if not batches:
            return Bucket(pa.table({}), 0, np.empty(0, np.int64))
        rows = pa.Table.from_batches(batches).combine_chunks()
        keys = self.order.keys(rows.to_batches()[0])
        order, first = _order(rows, keys)
        if is_selected:
            first &= ~is_selected(rows["uid"].chunk(0).take(pa.array(order)), keys[order])
        return Bucket(rows.take(pa.array(order[first])), len(rows), np.flatnonzero(first))

    def _bucket_of(self, keys: Keys) -> npt.NDArray[np.uint16]:
        # The upper 32 bits times the number of buckets give ranges of keys, so that buckets are in order.
        return (((keys >> np.uint64(32)) * np.uint64(self.num_buckets)) >> np.uint64(32)).astype(np.uint16)


class _File:
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
    """Returns the shuffled order, and a mask over it of the first row of each uid."""
    order = np.argsort(keys)
    ordered = keys[order]
    same = ordered[1:] == ordered[:-1]
    first = np.ones(len(order), bool)
    if same.any():
        tied = np.flatnonzero(np.r_[same, False] | np.r_[False, same])
        # Rows with one uid, or URL, share a key; sorting by all columns makes the result independent of arrival order.
        some = rows.take(pa.array(order[tied])).append_column("shuffle key", pa.array(ordered[tied]))
        names = ["shuffle key", "uid", *(name for name in rows.column_names if name != "uid")]
        sorted_ = pc.sort_indices(some, sort_keys=[(name, "ascending") for name in names]).to_numpy()
        order[tied] = order[tied][sorted_]
        uids = some["uid"].take(pa.array(sorted_)).to_numpy()
        first[tied[1:]] = uids[1:] != uids[:-1]
    return order, first
