"""Rewriting of finished files without some samples; all others stay byte-identical."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdtrain.dataset.files import publish, read_parquet, scratch
from sdtrain.dataset.layout import DatasetDir, delete_index
from sdtrain.dataset.tars import BLOCK_BYTES, RECORD_BYTES, SampleIndex, index_samples
from sdtrain.download.image_shards import (
    ImageShard,
    TarMembers,
    image_location,
    read_rows,
    read_shard_table,
    rewrite_stats,
    write_shard,
)
from sdtrain.download.publish import final_files, publish_images, recover_images
from sdtrain.encode.stage import latent_offset

Uids = Collection[str]


def drop_rows(path: Path, uids: Uids, described: Mapping[bytes, bytes] | None = None) -> None:
    """Rewrites a Parquet file without rows of `uids`, a row group at a time; adds `described` to its metadata."""
    gone = pa.array(sorted(uids), pa.string())
    with pq.ParquetFile(path) as file, publish(path) as temporary:
        schema = file.schema_arrow.with_metadata({**(file.schema_arrow.metadata or {}), **(described or {})})
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for number in range(file.num_row_groups):
                rows = file.read_row_group(number)
                left = rows.filter(pc.invert(pc.is_in(rows["uid"], value_set=gone)))
                writer.write_table(left.replace_schema_metadata(schema.metadata), max(1, len(left)))


def drop_images(dataset: DatasetDir, shard: int, uids: Uids, fingerprint: str | None) -> None:
    """Removes samples from a downloaded shard's tar, table and statistics; sets `fingerprint` unless None."""
    recover_images(dataset, shard)
    final = final_files(dataset, shard)
    table = read_shard_table(final.table)
    rows = [row for row in read_rows(final.table) if row["uid"] not in uids]
    if table is None or (len(rows) == len(table.keys) and fingerprint in (None, table.fingerprint)):
        return
    members = TarMembers(final.tar)
    try:
        with scratch(dataset.root, f"remove-{shard:05d}") as folder:
            made = ImageShard.in_folder(folder, shard)
            digest = write_shard(made, rows, lambda row: members(row["key"]), fingerprint or table.fingerprint)
            rewrite_stats(final.stats, made.stats, rows)
            publish_images(dataset, shard, made, digest)
    finally:
        members.close()


def drop_packed(tar: Path, table: Path, uids: Uids) -> None:
    """Removes samples from a packed shard."""

    def place(tar: Path, sample: SampleIndex) -> dict[str, Any]:
        return image_location(sample)

    _drop_from_pair(tar, table, uids, place)


def drop_latents(tar: Path, table: Path, uids: Uids) -> None:
    """Removes samples from a shard of latents."""
    _drop_from_pair(tar, table, uids, latent_offset)
    delete_index(table)


def _drop_from_pair(tar: Path, table: Path, uids: Uids, place: Callable[[Path, SampleIndex], dict[str, Any]]) -> None:
    rows = read_parquet(table)
    left = rows.filter(pc.invert(pc.is_in(rows["uid"], value_set=pa.array(sorted(uids), pa.string()))))
    keys = set(rows["key"].to_pylist()) - set(left["key"].to_pylist())
    copy_without(tar, keys)
    # Read from the current tar, so that a table left unwritten by a killed run comes out the same.
    samples = {sample.key: sample for sample in index_samples(tar)}
    placed = [row | place(tar, samples[row["key"]]) for row in left.to_pylist()]
    with publish(table) as temporary:
        pq.write_table(pa.Table.from_pylist(placed, rows.schema), temporary, compression="zstd")


def copy_without(tar: Path, keys: Collection[str]) -> None:
    """Rewrites a tar without some samples, copying the others' headers and bodies unchanged."""
    samples = index_samples(tar)
    if not any(sample.key in keys for sample in samples):
        return
    with tar.open("rb") as source, publish(tar) as temporary, temporary.open("wb") as target:
        begin = 0
        for sample in samples:
            end = max(member.offset + _padded(member.size) for member in sample.members.values())
            if sample.key not in keys:
                _copy(source, target, begin, end)
            begin = end
        # Two empty blocks, padded to a whole record, as tarfile ends its files.
        target.write(bytes(2 * BLOCK_BYTES))
        target.write(bytes(-target.tell() % RECORD_BYTES))


def _copy(source: IO[bytes], target: IO[bytes], begin: int, end: int) -> None:
    source.seek(begin)
    while begin < end:
        part = source.read(min(end - begin, shutil.COPY_BUFSIZE))  # type: ignore[attr-defined]
        target.write(part)
        begin += len(part)


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
