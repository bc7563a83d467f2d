"""The captions of packed samples: read in one pass from the stage's tables, described, and removed from files."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sdtrain.dataset.config import CaptionConfig
from sdtrain.dataset.files import publish, read_parquet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import selected_shards
from sdtrain.dataset.rewriting import Place
from sdtrain.dataset.tars import read_samples, write_samples

ALT = "alt"
"""The source of texts that come from the metadata: an image's own, and those of its duplicates."""
CAPTIONS = "captions"
"""Where JSON and tables hold the list of a sample's captions."""
OTHERS = "origin_uids"
"""The packed table's column of other samples that the captions come from; only where the samples have captions."""
SOURCES_KEY = "sdtrain.caption_sources"
"""In the metadata of packed and latents tables, JSON: the sources of their captions, in order."""
LIST = pa.list_(pa.struct([(name, pa.string()) for name in ("source", "text", "origin_uid")]))
"""The captions of one sample."""
_STREAMED = pa.schema([("uid", pa.string()), (CAPTIONS, LIST)])


class PackedCaption(TypedDict):
    """One caption of a sample, as JSON holds it."""

    source: str
    text: str
    origin_uid: str


def captions_of_all(dataset: DatasetDir, config: CaptionConfig) -> pa.RecordBatchReader:
    """Each image's captions that pass the limits, in the order of its table, shard after shard: `uid` and `captions`.

    Where none passes, the image's own alt text stays: limits are on captions, and rules of DECIDE on images.
    """
    paths = [dataset.captions_table(shard) for shard in selected_shards(dataset)]
    return pa.RecordBatchReader.from_batches(_STREAMED, (_together(path, config) for path in paths))


def _passing(rows: pa.Table, config: CaptionConfig) -> pa.Table:
    passes = pa.array(np.ones(len(rows), bool))
    if config.min_caption_similarity is not None:
        # As float32, which the table holds: 0.3 passes a limit of 0.3.
        least = pa.scalar(config.min_caption_similarity, pa.float32())
        passes = pc.fill_null(pc.greater_equal(rows["similarity"], least), False)
    if config.max_caption_tokens is not None:
        passes = pc.and_(passes, pc.less_equal(rows["num_tokens"], config.max_caption_tokens))
    has_any = pc.is_in(rows["uid"], value_set=rows.filter(passes)["uid"].combine_chunks())
    is_own = pc.and_(pc.equal(rows["source"], ALT), pc.equal(rows["uid"], rows["origin_uid"]))
    return rows.filter(pc.or_(passes, pc.and_(is_own, pc.invert(has_any))))


def _together(path: Path, config: CaptionConfig) -> pa.RecordBatch:
    """A shard's table, whose rows of one image lie together, with a row for each image."""
    rows = read_parquet(path)
    rows = (_passing(rows, config) if config.limits() else rows).combine_chunks()
    uids = rows["uid"].to_numpy(zero_copy_only=False)
    first = np.flatnonzero(np.append(True, uids[1:] != uids[:-1])) if len(uids) else np.empty(0, np.int64)
    captions = pa.StructArray.from_arrays(
        [pa.concat_arrays(rows[field.name].chunks) for field in LIST.value_type], fields=list(LIST.value_type)
    )
    lists = pa.ListArray.from_arrays(pa.array(np.append(first, len(uids)), pa.int32()), captions)
    return pa.RecordBatch.from_arrays([pa.array(uids[first], pa.string()), lists.cast(LIST)], schema=_STREAMED)


def others_of(uid: str, captions: Iterable[PackedCaption]) -> list[str]:
    """The other samples that a sample's captions come from."""
    return sorted({caption["origin_uid"] for caption in captions} - {uid})


def describe_sources(samples: Iterable[Sequence[PackedCaption]]) -> dict[str, str]:
    """For the metadata of a table: the sources of the samples' captions."""
    return {SOURCES_KEY: json.dumps(sorted({caption["source"] for captions in samples for caption in captions}))}


def sources_in(metadata: Mapping[bytes, bytes] | None) -> tuple[str, ...]:
    """The sources that a table's metadata name; none if its samples have no captions but the alt text."""
    return tuple(json.loads((metadata or {}).get(SOURCES_KEY.encode(), b"[]")))


def has_captions(packed: Path) -> bool:
    """Whether the samples of a packed shard have captions, by its table."""
    return packed.exists() and SOURCES_KEY.encode() in (pq.read_schema(packed).metadata or {})


def drop_texts(
    table: Path,
    origins: Collection[str],
    place: Place,
    described: Callable[[list[dict[str, Any]]], dict[str, str]] = lambda rows: {},
) -> None:
    """Rewrites a table, and the JSON in the tar beside it, without the captions that come from `origins`.

    `described`, of the rows that are left, goes into the table's metadata. Run again after a kill, it ends the same.
    """
    if not origins:
        return
    tar, rows = table.with_suffix(".tar"), read_parquet(table)
    with publish(tar) as temporary:
        samples = read_samples(tar)
        left = ((key, members | {"json": _strip_json(members["json"], origins)}) for key, members in samples)
        written = {sample.key: sample for sample in write_samples(temporary, left)}
    placed = [_strip_row(row, origins) | place(tar, written[row["key"]]) for row in rows.to_pylist()]
    schema = rows.schema.with_metadata({**(rows.schema.metadata or {}), **described(placed)})
    with publish(table) as temporary:
        pq.write_table(pa.Table.from_pylist(placed, schema), temporary, compression="zstd")


def _strip_json(content: bytes, origins: Collection[str]) -> bytes:
    sample = json.loads(content)
    left = _strip_row({CAPTIONS: sample.get(CAPTIONS)}, origins)
    return json.dumps(sample | left, ensure_ascii=False, sort_keys=True).encode()


def _strip_row(row: dict[str, Any], origins: Collection[str]) -> dict[str, Any]:
    """The row without the removed captions, or names of those that they come from."""
    left = dict(row)
    if row.get(CAPTIONS):
        left[CAPTIONS] = [caption for caption in row[CAPTIONS] if caption["origin_uid"] not in origins]
    if row.get(OTHERS):
        left[OTHERS] = [uid for uid in row[OTHERS] if uid not in origins]
    return left
