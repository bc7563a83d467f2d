"""Reads and writes image shards in img2dataset's layout: a tar, and a table of all rows."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.dataset.files import FINGERPRINT, read_parquet, sha256_of
from sdtrain.dataset.tars import Member, SampleIndex, index_samples, write_samples
from sdtrain.download.rows import SCHEMA, Row
from sdtrain.images.decode import image_extension

_TAR_SHA256 = b"sdtrain.tar_sha256"
PLACE = pa.schema([("extension", pa.string()), ("picture_offset", pa.int64()), ("picture_bytes", pa.int64())])
"""Columns that locate a row's image in the tar without scanning its headers.

Their names are older than our word `image`. A shard made again must have the bytes of the one it replaces, or all that
was made from it counts as changed, so the names stay.
"""
TABLE = pa.unify_schemas([SCHEMA, PLACE])


@dataclass(frozen=True)
class ImageShard:
    """The paths of one shard's files."""

    tar: Path
    table: Path
    stats: Path

    @staticmethod
    def in_folder(folder: Path, shard: int) -> ImageShard:
        """One shard's files in `folder`, as img2dataset names them."""
        return ImageShard(
            folder / f"{shard:05d}.tar", folder / f"{shard:05d}.parquet", folder / f"{shard:05d}_stats.json"
        )


class TemporaryBlobFile:
    """Holds a shard's images on disk until all are there and can be sorted; threads may add concurrently."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        path.unlink()  # needs no name, and is freed with the process
        self._lock = threading.Lock()

    def add(self, content: bytes) -> Member:
        """Appends an image's bytes and returns their location."""
        with self._lock:
            offset = self._file.seek(0, 2)
            self._file.write(content)
        return Member(offset, len(content))

    def read(self, member: Member) -> bytes:
        """The bytes at a location."""
        with self._lock:
            self._file.seek(member.offset)
            return self._file.read(member.size)

    def close(self) -> None:
        """Frees the disk space."""
        self._file.close()


def write_shard(
    shard: ImageShard, rows: Sequence[Row], members_of: Callable[[Row], dict[str, bytes]], fingerprint: str
) -> str:
    """Writes a shard's tar and table, and returns the tar's sha256.

    `rows` are all of the shard's, sorted by key; `members_of` gives a row's members in the tar, by extension, if it has
    an image. `fingerprint` is of all that decides the shard's bytes; the table records it, and the tar's digest.
    """
    images = ((row["key"], members_of(row)) for row in rows if row["reason"] is None)
    places = {sample.key: image_location(sample) for sample in write_samples(shard.tar, images)}
    digest = sha256_of(shard.tar)
    described = {FINGERPRINT: fingerprint.encode(), _TAR_SHA256: digest.encode()}
    nowhere = dict.fromkeys(PLACE.names)
    placed = [row | places.get(row["key"], nowhere) for row in rows]
    table = pa.Table.from_pylist(placed, TABLE).replace_schema_metadata(described)
    pq.write_table(table, shard.table, compression="zstd", row_group_size=max(1, len(rows)))
    return digest


def image_location(sample: SampleIndex) -> Row:
    """The columns `PLACE` of a sample in a tar."""
    extension = image_extension(sample.members)
    member = sample.members[extension]
    return {"extension": extension, "picture_offset": member.offset, "picture_bytes": member.size}


def new_members(row: Row, extension: str, content: bytes) -> dict[str, bytes]:
    """An image's tar members, as img2dataset writes them."""
    return {
        extension: content,
        "txt": (row["caption"] or "").encode(),
        "json": json.dumps(row, indent=4).encode(),
    }


@dataclass(frozen=True)
class ShardTable:
    """A shard's table without its wider columns."""

    keys: list[str]
    reasons: list[str | None]
    fingerprint: str
    tar_sha256: str


def read_shard_table(path: Path) -> ShardTable | None:
    """Reads a table that `write_shard` wrote; None for any other file, or none."""
    try:
        with pq.ParquetFile(path) as file:
            described = file.schema_arrow.metadata or {}
            table = file.read(["key", "reason"])
    except (OSError, pa.ArrowException):
        return None
    return ShardTable(
        table["key"].to_pylist(),
        table["reason"].to_pylist(),
        described.get(FINGERPRINT, b"").decode(),
        described.get(_TAR_SHA256, b"").decode(),
    )


def read_rows(path: Path) -> list[Row]:
    """All rows of a shard's table."""
    rows: list[Row] = read_parquet(path).to_pylist()
    return rows


class TarMembers:
    """The members of a finished tar, by key; close it when done."""

    def __init__(self, path: Path) -> None:
        self._index = {sample.key: sample.members for sample in index_samples(path)}
        self._file = path.open("rb")

    def __call__(self, key: str) -> dict[str, bytes]:
        """One sample's members, byte for byte."""
        return dict(self._read(key))

    def _read(self, key: str) -> Iterator[tuple[str, bytes]]:
        for extension, member in self._index[key].items():
            self._file.seek(member.offset)
            yield extension, self._file.read(member.size)

    def close(self) -> None:
        """Closes the tar."""
        self._file.close()
