"""Publishes a shard of images, takes samples out of one, and recovers one whose writer was killed.

If the writer is killed before `publish_images`, its scratch folder is deleted by the next run and the shard is
downloaded again. If it is killed while publishing, `recover_images` completes or discards the replacement. If it is
killed before the manifest entry is written, `reuse_images` finds the whole shard and downloads nothing. A shard whose
selection has changed stays in place until its replacement is made, so that `earlier_images` finds it however often that
is interrupted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from sdtrain.dataset.files import publish, scratch, sha256_of
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, selected_shards
from sdtrain.dataset.shard_report import Output, ShardReport
from sdtrain.dataset.sync import fetch_if_stored
from sdtrain.download.image_shards import (
    ImageShard,
    ShardTable,
    TarMembers,
    read_rows,
    read_shard_table,
    write_shard,
)
from sdtrain.download.shard_stats import Origin, read_origin, write_stats
from sdtrain.errors import UserError


def publish_images(dataset: DatasetDir, shard: int, made: ImageShard, tar_sha256: str) -> ShardReport:
    """Moves a finished shard, on the dataset's file system, to its final place.

    Killed at any point, it leaves a matching tar and table: the new table, which names the new tar by its digest, waits
    beside the old one until that tar is in place.
    """
    final = final_files(dataset, shard)
    _move(made.table, _next_table(final))
    if final.stats.exists():  # other tools take it for the mark of a finished shard
        final.stats.replace(_former_stats(final))
    _move(made.tar, final.tar)
    _move(_next_table(final), final.table)
    _move(made.stats, final.stats)
    _former_stats(final).unlink(missing_ok=True)
    table = read_shard_table(final.table)
    if table is None:
        raise AssertionError(f"{final.table} was written a moment ago")
    return _report(dataset, shard, final, table, tar_sha256)


def reuse_images(dataset: DatasetDir, shard: int, keys: Sequence[str], fingerprint: str) -> ShardReport | None:
    """The report of a whole, wanted shard that was published but not recorded; None if there is none."""
    final = final_files(dataset, shard)
    if not final.tar.exists():
        return None
    for path in (final.table, _next_table(final)):
        table = read_shard_table(path)
        if table is None or table.fingerprint != fingerprint or table.keys != list(keys):
            continue
        if sha256_of(final.tar) == table.tar_sha256:
            if path != final.table:
                _move(path, final.table)
            discard_next_table(dataset, shard)
            _restore_stats(final, selected_shards(dataset)[shard].sha256)
            return _report(dataset, shard, final, table, table.tar_sha256)
    return None


def earlier_images(dataset: DatasetDir, shard: int, fingerprint_of: Callable[[str], str]) -> ImageShard | None:
    """A whole, published version of the shard, made of another selection with the same settings; None if there is none.

    `fingerprint_of` gives the fingerprint of a shard made with these settings of a selection file with the given
    sha256.
    """
    recover_images(dataset, shard)
    final = final_files(dataset, shard)
    fetch_if_stored(dataset, final.stats)
    origin = read_origin(final.stats)
    if origin is None or origin.selection_sha256 is None:
        return None
    fetch_if_stored(dataset, final.table, final.tar)
    table = read_shard_table(final.table)
    if table is None or table.fingerprint != fingerprint_of(origin.selection_sha256) or not final.tar.exists():
        return None
    return final if sha256_of(final.tar) == table.tar_sha256 else None


def recover_images(dataset: DatasetDir, shard: int) -> None:
    """Completes or rolls back an interrupted publication, so that tar and table match again."""
    final = final_files(dataset, shard)
    waiting = read_shard_table(_next_table(final))
    if waiting and final.tar.exists() and sha256_of(final.tar) == waiting.tar_sha256:
        _move(_next_table(final), final.table)
    discard_next_table(dataset, shard)
    _restore_stats(final)


def drop_images(dataset: DatasetDir, shard: int, uids: Collection[str], fingerprint: str | None) -> None:
    """Takes samples out of a published shard's tar, table and statistics; sets `fingerprint` unless None."""
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
            selection = selected_shards(dataset)[shard].sha256 if fingerprint else None
            write_stats(made.stats, rows, _origin(final, selection))
            publish_images(dataset, shard, made, digest)
    finally:
        members.close()


def report_images(dataset: DatasetDir, shard: int) -> ShardReport:
    """The report of a shard as it is on disk; UserError if its table is damaged."""
    final = final_files(dataset, shard)
    table = read_shard_table(final.table)
    if table is None:
        raise UserError(
            f"{final.table} cannot be read. Delete it and run the build again: it downloads the shard again."
        )
    return _report(dataset, shard, final, table, table.tar_sha256)


def final_files(dataset: DatasetDir, shard: int) -> ImageShard:
    """The files of a published shard."""
    return ImageShard(dataset.images_tar(shard), dataset.images_table(shard), dataset.images_stats(shard))


def discard_next_table(dataset: DatasetDir, shard: int) -> None:
    """Deletes the table of an abandoned change, of which nothing else was published."""
    _next_table(final_files(dataset, shard)).unlink(missing_ok=True)


def _next_table(final: ImageShard) -> Path:
    # A name that no glob over tables matches.
    return final.table.with_name(f".{final.table.name}.next")


def _former_stats(final: ImageShard) -> Path:
    return final.stats.with_name(f".{final.stats.name}.former")


def _move(source: Path, target: Path) -> None:
    with publish(target) as temporary:
        source.rename(temporary)


def _restore_stats(final: ImageShard, selection_sha256: str | None = None) -> None:
    """Writes statistics that a killed change took away; those of before are given up."""
    if not final.stats.exists() and read_shard_table(final.table) and final.tar.exists():
        with publish(final.stats) as temporary:
            write_stats(temporary, read_rows(final.table), _origin(final, selection_sha256))
    _former_stats(final).unlink(missing_ok=True)


def _origin(final: ImageShard, selection_sha256: str | None) -> Origin:
    """The origin of a shard that has changed or lost its statistics, made of that selection, by default as before."""
    known = read_origin(final.stats) or read_origin(_former_stats(final))
    if known is None:
        finished = final.tar.stat().st_mtime  # the start time is lost
        known = Origin(finished, finished, None)
    return replace(known, selection_sha256=selection_sha256 or known.selection_sha256)


def _report(dataset: DatasetDir, shard: int, final: ImageShard, table: ShardTable, tar_sha256: str) -> ShardReport:
    counts = Counter(table.reasons)
    # Not the statistics, whose times differ from run to run.
    tar = {dataset.relative(final.tar): Output(sha256=tar_sha256, bytes=final.tar.stat().st_size)}
    return ShardReport(
        stage="download",
        shard=shard,
        num_in=len(table.keys),
        num_out=counts[None],
        dropped={reason: counts[reason] for reason in sorted(filter(None, counts))},
        outputs=tar | describe_outputs(dataset, [final.table]),
    )
