"""Reads and writes shards of images in img2dataset's layout: tar, table with all rows, statistics."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.dataset.files import read_parquet, sha256_of
from sdtrain.dataset.tars import Member, SampleIndex, index_samples, write_samples
from sdtrain.download.rows import SCHEMA, Row
from sdtrain.images.decode import image_extension

_FINGERPRINT, _TAR_SHA256 = b"sdtrain.fingerprint", b"sdtrain.tar_sha256"
PLACE = pa.schema([("extension", pa.string()), ("picture_offset", pa.int64()), ("picture_bytes", pa.int64())])
"""Columns that say where a row's image lies in the tar, so that nobody needs to look through its headers."""
TABLE = pa.unify_schemas([SCHEMA, PLACE])


@dataclass(frozen=True)
class ImageShard:
    """Where the files of one shard lie."""

    tar: Path
    table: Path
    stats: Path

    @staticmethod
    def in_folder(folder: Path, shard: int) -> ImageShard:
        """The files of one shard in `folder`, as img2dataset names them."""
        return ImageShard(
            folder / f"{shard:05d}.tar", folder / f"{shard:05d}.parquet", folder / f"{shard:05d}_stats.json"
        )


class TemporaryBlobFile:
    """Images of a shard, on disk until all are there and can be put in order; threads may add side by side."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        path.unlink()  # it needs no name, and goes with the process
        self._lock = threading.Lock()

    def add(self, content: bytes) -> Member:
        """Keeps an image's bytes; says where they lie."""
        with self._lock:
            offset = self._file.seek(0, 2)
            self._file.write(content)
        return Member(offset, len(content))

    def read(self, member: Member) -> bytes:
        """The bytes that were kept there."""
        with self._lock:
            self._file.seek(member.offset)
            return self._file.read(member.size)

    def close(self) -> None:
        """Gives the space back."""
        self._file.close()


def write_shard(
    shard: ImageShard, rows: Sequence[Row], members_of: Callable[[Row], dict[str, bytes]], fingerprint: str
) -> str:
    """Writes tar and table of a shard.

    Args:
        shard: where to.
        rows: all of its rows, sorted by key.
        members_of: an image's members in the tar, by extension, for a row that has one.
        fingerprint: of what decided the shard's bytes; stands in the table, beside the tar's digest.

    Returns:
        The tar's sha256.
    """
    images = ((row["key"], members_of(row)) for row in rows if row["reason"] is None)
    places = {sample.key: image_location(sample) for sample in write_samples(shard.tar, images)}
    digest = sha256_of(shard.tar)
    described = {_FINGERPRINT: fingerprint.encode(), _TAR_SHA256: digest.encode()}
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
    """The tar members of an image, as img2dataset has them."""
    return {
        extension: content,
        "txt": (row["caption"] or "").encode(),
        "json": json.dumps(row, indent=4).encode(),
    }


def write_stats(path: Path, rows: Sequence[Row], start_time: float, end_time: float) -> None:
    """Writes img2dataset's statistics, with reasons where it has messages."""
    status = Counter(row["status"] for row in rows)
    stats = {
        "count": len(rows),
        "successes": status["success"],
        "failed_to_download": status["failed_to_download"],
        "failed_to_resize": status["failed_to_resize"],
        "duration": end_time - start_time,
        "start_time": start_time,
        "end_time": end_time,
        "status_dict": dict(sorted(Counter(row["reason"] or "success" for row in rows).items())),
    }
    path.write_text(json.dumps(stats, indent=4))


def rewrite_stats(old: Path, new: Path, rows: Sequence[Row]) -> None:
    """Writes the statistics of a shard that has other rows now, with the times of its download."""
    times = json.loads(old.read_text()) if old.exists() else {}
    write_stats(new, rows, times.get("start_time", 0.0), times.get("end_time", 0.0))


@dataclass(frozen=True)
class ShardTable:
    """What a shard's table says, without its wider columns."""

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
        described.get(_FINGERPRINT, b"").decode(),
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
        """The members of one sample, byte for byte."""
        return dict(self._read(key))

    def _read(self, key: str) -> Iterator[tuple[str, bytes]]:
        for extension, member in self._index[key].items():
            self._file.seek(member.offset)
            yield extension, self._file.read(member.size)

    def close(self) -> None:
        """Closes the tar."""
        self._file.close()
