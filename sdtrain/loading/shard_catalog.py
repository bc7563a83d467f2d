"""Catalogues a dataset's latent shards from their tables' footers, and locates each row."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import delete_index, index_path
from sdtrain.encode.info import SIZES_KEY, TEXT_KEY, VAE_KEY
from sdtrain.errors import UserError
from sdtrain.loading.captions import Caption
from sdtrain.pack.captions import CAPTIONS, sources_in

_FILE = "catalogue.json"
_VERSION = 3
_WORTH_KEEPING = 256
_READERS = 16
_COLUMNS = ["uid", "caption", "offset", "num_bytes", "height", "width"]
_TEXT_OFFSET = "text_offset"
"""Only in tables of shards with text embeddings."""
_DIGEST = b"table_digest"


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard's table, from its footer, and the number of samples of each size.

    Attributes:
        stamp: its size in bytes and time of change, which show whether the rest is still valid.
        digest: sha256 of its footer, which holds counts, sizes, statistics and the digest of the rows.
        made_by: digest of the VAE.
        text_by: digest of the text encoder, empty without cached embeddings.
        sources: of the samples' captions; none if they have only alt texts.
    """

    table: str
    stamp: tuple[int, int]
    digest: str
    made_by: str
    text_by: str
    sources: tuple[str, ...]
    samples: tuple[int, ...]


class Catalogue:
    """The shards of one dataset, in the order of their numbers; UserError if a table cannot be read.

    Many footers are cached in `latents/catalogue.json`; an entry is valid while its table's size and time are the same.
    `digest` is the sha256 over the shards' digests, which identifies the dataset. `folder` is `latents/`, whose latents
    have the heights and widths in `sizes`.
    """

    def __init__(self, folder: Path, sizes: Sequence[tuple[int, int]]) -> None:
        known = {shard.table: shard for shard in _kept(folder / _FILE) if len(shard.samples) == len(sizes)}
        found = _tables(folder)
        fresh = [name for name, stamp in found.items() if name not in known or known[name].stamp != stamp]
        with ThreadPoolExecutor(_READERS) as pool:
            read = pool.map(lambda name: _read(folder / name, found[name], sizes), fresh)
            known |= {shard.table: shard for shard in read}
        self.shards = [known[name] for name in found]
        self.digest = hashlib.sha256("\n".join(shard.digest for shard in self.shards).encode()).hexdigest()
        if len(fresh) >= _WORTH_KEEPING:
            _keep(folder / _FILE, self.shards)

    def sources(self) -> tuple[str, ...]:
        """The sources of the samples' captions in any of the shards, in order."""
        return tuple(sorted({source for shard in self.shards for source in shard.sources}))

    def counts(self) -> NDArray[np.int64]:
        """Samples of each size in each shard, (shards, sizes)."""
        return np.array([shard.samples for shard in self.shards], np.int64)


def whole_tables_digest(folder: Path) -> str:
    """The dataset's digest in older checkpoints: sha256 over all bytes of all tables."""
    digest = hashlib.sha256()
    for name in _tables(folder):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _tables(folder: Path) -> dict[str, tuple[int, int]]:
    """Names of the shards' tables, in order, with their size and time."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        tables = [e for e in entries if e.name.endswith(".parquet") and e.name[0].isdigit()]
        stats = {entry.name: entry.stat() for entry in tables}
    # By number: from 100,000 on, names are longer.
    names = sorted(stats, key=lambda name: (len(name), name))
    return {name: (stats[name].st_size, stats[name].st_mtime_ns) for name in names}


def footer_digest(table: Path) -> str:
    """The sha256 of a table's footer; OSError if the file is missing or too short to be Parquet."""
    with table.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        footer_bytes = int.from_bytes(file.read(4), "little")
        file.seek(-8 - footer_bytes, os.SEEK_END)
        return hashlib.sha256(file.read(footer_bytes)).hexdigest()


def _read(path: Path, stamp: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> Shard:
    try:
        digest = footer_digest(path)
        described = pq.read_metadata(path)
        metadata = described.metadata or {}
        samples = [described.num_rows] if len(sizes) == 1 else json.loads(metadata.get(SIZES_KEY.encode(), b"[]"))
        if len(samples) != len(sizes) or sum(samples) != described.num_rows:  # some were removed since
            samples = _count(path, sizes)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}. Run the build again: it redoes damaged shards.") from error
    made_by, text_by = (metadata.get(key.encode(), b"").decode() for key in (VAE_KEY, TEXT_KEY))
    return Shard(path.name, stamp, digest, made_by, text_by, sources_in(metadata), tuple(samples))


def _count(path: Path, sizes: Sequence[tuple[int, int]]) -> list[int]:
    with pq.ParquetFile(path) as file:
        rows = file.read(["height", "width"])
    sides = np.stack([rows["height"].to_numpy(), rows["width"].to_numpy()], axis=1)
    counts = [int((sides == size).all(axis=1).sum()) for size in sizes]
    if sum(counts) != len(sides):
        raise ValueError("it holds latents of sizes that latents/info.json does not name")
    return counts


def _kept(path: Path) -> list[Shard]:
    try:
        version, rows = json.loads(path.read_bytes())
        known = rows if version == _VERSION else []
        return [Shard(t, tuple(s), d, m, x, tuple(c), tuple(n)) for t, s, d, m, x, c, n in known]
    except (OSError, ValueError, TypeError):
        return []


def _keep(path: Path, shards: list[Shard]) -> None:
    rows = [[s.table, s.stamp, s.digest, s.made_by, s.text_by, s.sources, s.samples] for s in shards]
    with suppress(OSError), publish(path) as temporary:  # a read-only folder only costs time
        temporary.write_text(json.dumps([_VERSION, rows]))


class ShardIndex:
    """The rows of one shard's table.

    Decoding a table of 10,000 rows takes milliseconds and megabytes, and a global shuffle visits another shard with
    every sample. So a large dataset's tables have copies `NNNNN.index.arrow`, which are mapped into memory so that only
    the wanted rows' pages are read, and rebuilt if missing or of another table.
    """

    def __init__(self, rows: pa.RecordBatch) -> None:
        self._uids, self._captions, self._offsets, self._num_bytes = (rows[name] for name in _COLUMNS[:4])
        self._rows = rows
        self._rows_of: dict[tuple[int, int], NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def rows_of(self, size: tuple[int, int]) -> NDArray[np.int64]:
        """The rows whose latents have this height and width, in order."""
        if size not in self._rows_of:
            height, width = (self._rows[name].to_numpy() for name in _COLUMNS[4:6])
            self._rows_of[size] = np.flatnonzero((height == size[0]) & (width == size[1]))
        return self._rows_of[size]

    def uid(self, row: int) -> str:
        """The sample's uid."""
        return str(self._uids[row].as_py())

    def caption(self, row: int) -> str:
        """The sample's caption."""
        return self._captions[row].as_py() or ""

    def captions(self, row: int) -> list[Caption]:
        """All captions of the sample; KeyError if the shard's samples have only alt texts."""
        return [Caption(each["source"], each["text"]) for each in self._rows[CAPTIONS][row].as_py() or ()]

    def text_offset(self, row: int) -> int:
        """The offset of a caption's embedding in the tar; KeyError if the shard has none."""
        return int(self._rows[_TEXT_OFFSET][row].as_py())

    def extent(self, row: int) -> tuple[int, int]:
        """A latent's offset in the tar, and its number of bytes."""
        return self._offsets[row].as_py(), self._num_bytes[row].as_py()


def read_index(table: Path, digest: str, keep: bool, with_captions: bool = False) -> ShardIndex:
    """The index of one shard's Parquet file `table`, `with_captions` if they are asked for.

    UserError if that cannot be read.

    `digest` is the table's in the catalogue; another one's index is not used. `keep` writes the index beside the table
    for the next time; a read-only folder is no error.
    """
    path = index_path(table)
    mapped = _mapped(path, digest) if path.exists() else None
    if mapped is not None and (not with_captions or CAPTIONS in mapped.schema.names):
        return ShardIndex(mapped)
    rows = _rows_of_table(table, with_captions)
    if keep:
        with suppress(OSError):
            delete_index(table)
            _write_index(path, rows, digest)
    return ShardIndex(rows)


def _rows_of_table(table: Path, with_captions: bool) -> pa.RecordBatch:
    try:
        with pq.ParquetFile(table) as file:
            columns = [*_COLUMNS, *({_TEXT_OFFSET} & set(file.schema_arrow.names)), *([CAPTIONS] * with_captions)]
            rows = file.read(columns)
        return pa.RecordBatch.from_arrays([pa.concat_arrays(rows[name].chunks) for name in columns], columns)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{table} cannot be read: {error}. Run the build again: it redoes damaged shards.") from error


def _write_index(path: Path, rows: pa.RecordBatch, digest: str) -> None:
    """Writes one batch in Arrow's stream format, which opens faster than its file format."""
    schema = rows.schema.with_metadata({_DIGEST: digest})
    with publish(path) as temporary, pa.ipc.new_stream(str(temporary), schema) as writer:
        writer.write_batch(rows)


def _mapped(path: Path, digest: str) -> pa.RecordBatch | None:
    """Maps the rows without reading them; None if the file is damaged or belongs to another table."""
    try:
        with pa.memory_map(str(path)) as content, pa.ipc.open_stream(content) as reader:
            if reader.schema.metadata[_DIGEST] != digest.encode():
                return None
            rows = reader.read_next_batch()
        rows.validate()  # offsets that point out of the file
    except (OSError, ValueError, KeyError, TypeError, StopIteration, pa.ArrowException):
        return None
    return rows
