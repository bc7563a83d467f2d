"""Collects what the duplicates of each image were called: one pass over all shards, read shard by shard."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import duckdb
import pyarrow.parquet as pq

from sdtrain.dataset.config import CaptionConfig
from sdtrain.dataset.files import one_process_at_a_time, publish, raise_if_disk_full, scratch
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import require_entry, selected_shards
from sdtrain.dataset.shard_report import fingerprint
from sdtrain.dataset.tables.connection import connected, unordered
from sdtrain.download.retry import is_retryable

Texts = list[dict[str, str]]
"""Of one image: the texts, each with the `origin` that it comes from."""

# Decoded images, with their group of duplicates or themselves as one.
_IMAGES = """
CREATE TEMP TABLE images AS
SELECT i.uid, i.key, i.url, i.caption, parse_filename(i.filename, true)::INTEGER AS shard,
    coalesce(d.group_id, i.uid) AS kin
FROM read_parquet($images, filename = true) i JOIN read_parquet($scores) c USING (uid)
LEFT JOIN read_parquet($duplicates) d USING (uid)
WHERE i.reason IS NULL AND c.reason IS NULL
"""
# Rows whose image may be there all the same, by another row's fetch of their URL.
_UNFETCHED = """
CREATE TEMP TABLE unfetched AS
SELECT uid, key, url, caption, reason FROM read_parquet($images) WHERE reason IN (SELECT unnest($reasons))
"""
# The first of each text, and of these the first few: groups may be larger than memory.
_KIN = """
CREATE TEMP TABLE kin_texts AS
WITH called AS (
    SELECT kin, uid, key, caption FROM images WHERE kin IN (SELECT group_id FROM read_parquet($duplicates))
    UNION SELECT i.kin, f.uid, f.key, f.caption FROM unfetched f JOIN images i USING (url)
), single AS (
    SELECT kin, caption, min_by({'key': key, 'origin': uid, 'text': caption}, key) AS called
    FROM called WHERE trim(caption) <> '' GROUP BY ALL
)
SELECT kin, min_by(called, called.key, $most) AS texts FROM single GROUP BY kin
"""
_TEXTS = """
SELECT shard, uid, list_transform(others, t -> {'origin': t.origin, 'text': t.text}) AS texts FROM (
    SELECT i.shard, i.key, i.uid, list_filter(k.texts, t -> t.text <> coalesce(i.caption, ''))[:$num] AS others
    FROM images i JOIN kin_texts k USING (kin)
) WHERE len(others) > 0 ORDER BY shard, key
"""
_ROWS_PER_GROUP = 8192
_DIGEST = b"sdtrain.duplicate_texts"
_ONE_AT_A_TIME = Lock()


def duplicate_texts(dataset: DatasetDir, config: CaptionConfig, shard: int) -> dict[str, Texts]:
    """What other rows call the images of one shard, by uid: other texts than the image's own, each once.

    Those are the rows that `dedup` groups with an image, and rows with its URL whose fetch failed for a passing reason.
    UserError if the groups are not finished.
    """
    path = _collected(dataset, config)
    metadata, firsts, lasts = _footer(path, *_stamp(path))
    found: dict[str, Texts] = {}
    with pq.ParquetFile(path, metadata=metadata) as file:
        for number in range(bisect_left(lasts, shard), bisect_right(firsts, shard)):
            rows = (row for row in file.read_row_group(number).to_pylist() if row["shard"] == shard)
            found |= {row["uid"]: row["texts"] for row in rows}
    return found


def forget_duplicate_texts(dataset: DatasetDir) -> None:
    """Deletes the collection, which is made again when needed."""
    dataset.duplicate_texts.unlink(missing_ok=True)


def _collected(dataset: DatasetDir, config: CaptionConfig) -> Path:
    grouped = require_entry(dataset, "dedup", 0)
    digest = fingerprint("duplicate_texts/1", [grouped.fingerprint, config.max_from_duplicates], [grouped])
    path = dataset.duplicate_texts
    with _ONE_AT_A_TIME, one_process_at_a_time(path.parent):
        if not path.exists() or (_footer(path, *_stamp(path))[0].metadata or {}).get(_DIGEST) != digest.encode():
            _collect(dataset, config.max_from_duplicates, digest)
        return path


def _collect(dataset: DatasetDir, num: int, digest: str) -> None:
    shards = selected_shards(dataset)
    images = {"images": [str(dataset.images_table(shard)) for shard in shards]}
    scores = {"scores": [str(dataset.scores(shard)) for shard in shards]}
    duplicates = {"duplicates": str(dataset.duplicates)}
    with (
        publish(dataset.duplicate_texts) as temporary,
        scratch(dataset.root, "duplicate-texts") as folder,
        connected(spill=folder) as connection,
    ):
        options = f"FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {_ROWS_PER_GROUP}"
        # No user input is interpolated: the digest is hexadecimal.
        written = f"COPY ({_TEXTS}) TO $target ({options}, KV_METADATA {{'{_DIGEST.decode()}': '{digest}'}})"
        try:
            with unordered(connection):
                connection.execute(_IMAGES, images | scores | duplicates)
                connection.execute(_UNFETCHED, images | {"reasons": _passing(connection, images)})
                connection.execute(_KIN, duplicates | {"most": num + 1})
            connection.execute(written, {"num": num, "target": str(temporary)})
        except duckdb.Error as error:
            raise_if_disk_full(error, dataset.duplicate_texts)
            raise


def _passing(connection: duckdb.DuckDBPyConnection, images: dict[str, Any]) -> list[str]:
    """The reasons that say nothing against an image: its URL may have answered another row."""
    reasons = connection.execute("SELECT DISTINCT reason FROM read_parquet($images) WHERE reason IS NOT NULL", images)
    return sorted(reason for (reason,) in reasons.fetchall() if is_retryable(reason))


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


@lru_cache(maxsize=1)
def _footer(path: Path, inode: int, mtime_ns: int) -> tuple[pq.FileMetaData, list[int], list[int]]:
    """The footer, and each group's first and last shard; read once, as all grow with the number of shards."""
    metadata = pq.read_metadata(path)
    place = metadata.schema.to_arrow_schema().get_field_index("shard")
    held = [metadata.row_group(number).column(place).statistics for number in range(metadata.num_row_groups)]
    return metadata, [each.min for each in held], [each.max for each in held]
