"""Where each sample of one shard of latents lies, in a form that is read by row and not as a whole."""

from __future__ import annotations

import json
import mmap
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.numpy import save

from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import index_path
from sdtrain.errors import UserError

_COLUMNS = ["uid", "caption", "offset", "num_bytes", "height", "width"]
_DIGEST = "table_digest"


class ShardIndex:
    """The rows of one shard's table as arrays, in memory or in a mapped file.

    A table of 10,000 rows takes milliseconds to decode and megabytes to keep; a global shuffle goes to another shard
    with every sample. So beside the tables of a large dataset lies `NNNNN.index.safetensors`, of which only the
    pages of the wanted rows are read. It is a copy: made when it is missing or does not belong to the table.

    Attributes:
        offsets: (N,), where each latent begins in the tar.
        num_bytes: (N,), how long it is.
        sides: (N, 2), height and width as the table tells them.
    """

    def __init__(self, arrays: dict[str, NDArray[Any]]) -> None:
        self.offsets, self.num_bytes, self.sides = (arrays[name] for name in ("offset", "num_bytes", "sides"))
        self._uids, self._captions = arrays["uid"], arrays["caption"]
        self._uid_ends, self._caption_ends = arrays["uid_end"], arrays["caption_end"]
        self._rows_of: dict[tuple[int, int], NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self.offsets)

    def rows_of(self, size: tuple[int, int]) -> NDArray[np.int64]:
        """The rows whose latents have this height and width, in order."""
        if size not in self._rows_of:
            self._rows_of[size] = np.flatnonzero((self.sides == size).all(axis=1))
        return self._rows_of[size]

    def uid(self, row: int) -> str:
        """The identity of a sample."""
        return _text(self._uids, self._uid_ends, row)

    def caption(self, row: int) -> str:
        """The caption of a sample."""
        return _text(self._captions, self._caption_ends, row)


def read_index(table: Path, digest: str, keep: bool) -> ShardIndex:
    """The index of one shard.

    Args:
        table: its Parquet file.
        digest: of the table, as the catalogue has it; another one's index is not used.
        keep: write the index beside the table for the next time. A folder that cannot be written is no error.

    Raises:
        UserError: the table cannot be read.
    """
    path = index_path(table)
    if path.exists() and (mapped := _mapped(path, digest)) is not None:
        return ShardIndex(mapped)
    arrays = _from_table(table)
    if keep:
        with suppress(OSError), publish(path) as temporary:
            temporary.write_bytes(save(arrays, {_DIGEST: digest}))
    return ShardIndex(arrays)


def _from_table(table: Path) -> dict[str, NDArray[Any]]:
    try:
        with pq.ParquetFile(table) as file:
            rows = file.read(_COLUMNS).combine_chunks()
        sides = np.stack([rows["height"].to_numpy(), rows["width"].to_numpy()], axis=1).astype(np.int32)
        arrays = {name: rows[name].to_numpy().astype(np.int64) for name in ("offset", "num_bytes")} | {"sides": sides}
        for name in ("uid", "caption"):
            arrays[name], arrays[f"{name}_end"] = _flat(rows[name])
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{table} cannot be read: {error}. Run the build again: it redoes damaged shards.") from error
    return arrays


def _flat(column: pa.ChunkedArray) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    texts = [text.encode() for text in column.fill_null("").to_pylist()]
    return np.frombuffer(b"".join(texts), np.uint8), np.cumsum([len(text) for text in texts], dtype=np.int64)


def _text(characters: NDArray[np.uint8], ends: NDArray[np.int64], row: int) -> str:
    return characters[ends[row - 1] if row else 0 : ends[row]].tobytes().decode()


def _mapped(path: Path, digest: str) -> dict[str, NDArray[Any]] | None:
    """The arrays of a safetensors file without reading them; None if it is damaged or belongs to another table."""
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:begin])
        if header.pop("__metadata__")[_DIGEST] != digest:
            return None
        return {name: _array(content, begin, described) for name, described in header.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _array(content: mmap.mmap, begin: int, described: dict[str, Any]) -> NDArray[Any]:
    kinds = {"U8": np.uint8, "I32": np.int32, "I64": np.int64}
    shape, (first, _) = described["shape"], described["data_offsets"]
    return np.frombuffer(content, kinds[described["dtype"]], int(np.prod(shape)), begin + first).reshape(shape)
