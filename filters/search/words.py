"""Search by the words of captions, which needs no network."""

from __future__ import annotations

import re
from contextlib import closing

import duckdb

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.selection import selected_shards

_WORD = re.compile(r"\w+")
# Captions are cut at all that is neither letter nor digit nor underscore, as `\w` has it.
_MATCHED = """
SELECT len(list_intersect(string_split_regex(lower(caption), '[^\\p{L}\\p{N}_]+'), $words)) AS matched, shard, uid
FROM (SELECT uid, caption, key, parse_filename(filename, true)::INTEGER AS shard
      FROM read_parquet($images, filename = true, union_by_name = true) WHERE reason IS NULL AND caption IS NOT NULL)
WHERE matched > 0"""
_KEPT = " AND uid IN (SELECT uid FROM read_parquet($decisions) WHERE reason IS NULL)"
_FIRST = " ORDER BY matched DESC, length(caption), key LIMIT $top"


def by_words(dataset: DatasetDir, text: str, top: int, kept_only: bool = False) -> list[tuple[float, int, str]]:
    """(share of the words, shard, uid) of the downloaded images whose captions have most of them, shortest first."""
    words = sorted(set(_WORD.findall(text.lower())))
    images = [str(path) for shard in selected_shards(dataset) if (path := dataset.images_table(shard)).exists()]
    if not words or not images:
        return []
    with closing(duckdb.connect()) as connection:
        asked = {"words": words, "images": images, "top": top}
        asked |= {"decisions": str(dataset.decisions)} if kept_only else {}
        rows = connection.execute(_MATCHED + (_KEPT if kept_only else "") + _FIRST, asked).fetchall()
    return [(matched / len(words), shard, uid) for matched, shard, uid in rows]


def by_key(dataset: DatasetDir, key: str) -> list[tuple[float, int, str]]:
    """(1, shard, uid) of the downloaded image with this key, if there is one."""
    images = [str(path) for shard in selected_shards(dataset) if (path := dataset.images_table(shard)).exists()]
    query = (
        "SELECT 1.0, parse_filename(filename, true)::INTEGER, uid FROM read_parquet(?, filename = true, "
        "union_by_name = true) WHERE key = ? AND reason IS NULL"
    )
    with closing(duckdb.connect()) as connection:
        return connection.execute(query, [images, key]).fetchall() if images else []
