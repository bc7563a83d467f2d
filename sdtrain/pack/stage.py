"""The stage PACK: kept samples -> WebDataset shards of exactly N, in a global shuffle."""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.dataset.config import CaptionConfig, ImageRecipe, PackConfig
from sdtrain.dataset.files import numbered_files, publish
from sdtrain.dataset.layout import DatasetDir, delete_index
from sdtrain.dataset.manifest import describe_outputs, entries, require_entry
from sdtrain.dataset.rewriting import Removed, Rewriting, count_rows, drop_members
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import NOTHING, Stage, Table, always_on, nothing_beside
from sdtrain.dataset.storage import storage_of
from sdtrain.dataset.sync import discard, read_part
from sdtrain.dataset.tars import SampleIndex, write_samples
from sdtrain.dataset.work import WORK
from sdtrain.download.image_shards import PLACE, image_location
from sdtrain.errors import UserError
from sdtrain.pack.captions import CAPTIONS, OTHERS, describe_sources, drop_texts, others_of
from sdtrain.pack.plan import CARRIED, PROVENANCE, expected_shards, planned, shard_sizes

_TABLE = pa.schema([("uid", pa.string()), ("key", pa.string()), *PLACE])
# Far below a process's limit of open files; image shards may far outnumber that limit.
_OPEN_TARS = 128
# For tars on S3: concurrent requests, and images prefetched.
_THREADS, _AHEAD = 16, 64
_HEADER_BYTES = 512


class SourceTars:
    """Reads images from the downloaded shards, to another of which packing jumps with every sample.

    At most `max_open` files are open; the least recently used is closed first.
    """

    def __init__(self, dataset: DatasetDir, max_open: int = _OPEN_TARS) -> None:
        self._dataset, self._max_open = dataset, max_open
        self._open = OrderedDict[int, IO[bytes]]()
        self._threads = ThreadPoolExecutor(_THREADS, "pack")

    def read(self, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Yields the planned rows with their images, in order; UserError: a tar is missing, cut short or another's."""
        waiting = deque[tuple[dict[str, Any], Callable[[], bytes]]]()
        for row in rows:
            waiting.append((row, self._asked(row)))
            if len(waiting) > _AHEAD:
                yield _checked(self._dataset, *waiting.popleft())
        while waiting:
            yield _checked(self._dataset, *waiting.popleft())

    def close(self) -> None:
        """Closes all open tars."""
        self._threads.shutdown(cancel_futures=True)
        while self._open:
            self._open.popitem()[1].close()

    def _asked(self, row: dict[str, Any]) -> Callable[[], bytes]:
        """Returns a function that gives the bytes of an image and its tar header; a read from S3 has already begun."""
        tar, shard = self._dataset.images_tar(row["shard"]), row["shard"]
        extent = row["picture_offset"] - _HEADER_BYTES, row["picture_bytes"] + _HEADER_BYTES
        if shard in self._open or tar.exists() or not storage_of(self._dataset).is_remote:
            return partial(self._read_here, shard, *extent)
        return self._threads.submit(read_part, self._dataset, tar, *extent).result

    def _read_here(self, shard: int, offset: int, num_bytes: int) -> bytes:
        file = self._file(shard)
        file.seek(offset)
        return file.read(num_bytes)

    def _file(self, shard: int) -> IO[bytes]:
        if shard not in self._open:
            while len(self._open) >= self._max_open:
                self._open.popitem(last=False)[1].close()
            self._open[shard] = self._dataset.images_tar(shard).open("rb")
        self._open.move_to_end(shard)
        return self._open[shard]


def _checked(dataset: DatasetDir, row: dict[str, Any], read: Callable[[], bytes]) -> tuple[dict[str, Any], bytes]:
    tar = dataset.images_tar(row["shard"])
    place = tar if tar.exists() or not dataset.url else f"{dataset}/{dataset.relative(tar)}"
    try:
        content = read()
    except FileNotFoundError as error:
        raise UserError(
            f"There is no file {place}, whose images are to be packed. Run the build again: it rebuilds the shard."
        ) from error
    # The header begins with the name.
    is_named = content.startswith(f"{row['key']}.{row['extension']}".encode() + b"\0")
    if not is_named or len(content) < _HEADER_BYTES + row["picture_bytes"]:
        raise UserError(
            f"{place} is damaged or cut short: the image of {row['key']} is not where its table says. "
            "Delete it and run the build again: it downloads the shard again."
        )
    return row, content[_HEADER_BYTES:]


def pack_shard(
    dataset: DatasetDir, config: PackConfig, shard: int, captions: CaptionConfig | None = None
) -> ShardReport:
    """Copies one packed shard's samples out of the image shards, without re-encoding.

    `captions`: each with its captions that pass these limits, from the stage `caption`.
    """
    rows = planned(dataset, config, shard, captions)
    with closing(SourceTars(dataset)) as tars, publish(dataset.packed_tar(shard)) as temporary:
        samples = ((row["key"], _members(row, image)) for row, image in tars.read(rows))
        written = write_samples(temporary, samples)
    with publish(dataset.packed_table(shard)) as temporary:
        table = [_row(row, sample) for row, sample in zip(rows, written, strict=True)]
        pq.write_table(pa.Table.from_pylist(table, _schema(rows, captions is not None)), temporary, compression="zstd")
    outputs = describe_outputs(dataset, [dataset.packed_tar(shard), dataset.packed_table(shard)])
    return ShardReport(stage="pack", shard=shard, num_in=len(rows), num_out=len(written), outputs=outputs)


def write_index(dataset: DatasetDir) -> Path:
    """Writes dataset/index.json, which lists the finished shards in webdataset's `wids` format."""
    path = dataset.packed_tar(0).with_name("index.json")
    shards = []
    for entry in entries(dataset, "pack"):
        tar = dataset.packed_tar(entry.shard)
        output = entry.outputs[dataset.relative(tar)]
        shards.append({"url": tar.name, "nsamples": entry.num_out, "filesize": output.bytes, "sha256": output.sha256})
    content = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [s for s in shards if s["nsamples"]]}
    with publish(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _members(row: dict[str, Any], image: bytes) -> dict[str, bytes]:
    provenance = {name: row[name] for name in PROVENANCE} | row.get(CARRIED, {})
    if CAPTIONS in row:
        provenance[CAPTIONS] = row[CAPTIONS] or []
    return {
        row["extension"]: image,
        "txt": (row["caption"] or "").encode(),
        "json": json.dumps(provenance, ensure_ascii=False, sort_keys=True).encode(),
    }


def _row(row: dict[str, Any], written: SampleIndex) -> dict[str, Any]:
    others = {OTHERS: others_of(row["uid"], row[CAPTIONS] or [])} if CAPTIONS in row else {}
    return {"uid": row["uid"], "key": row["key"]} | image_location(written) | others


def _schema(rows: Sequence[dict[str, Any]], with_captions: bool) -> pa.Schema:
    if not with_captions:
        return _TABLE
    described = describe_sources(row[CAPTIONS] or [] for row in rows)
    return _TABLE.append(pa.field(OTHERS, pa.list_(pa.string()))).with_metadata(described)


def _shards(dataset: DatasetDir, recipe: ImageRecipe) -> list[int]:
    return list(range(len(shard_sizes(dataset, recipe.pack))))


def _fingerprint(dataset: DatasetDir, recipe: ImageRecipe, shard: int) -> str:
    decided = require_entry(dataset, "decide", 0)
    # Its fingerprint holds the image shards' digests: the same decisions may be about other bytes.
    # "keep" was the stage's name; finished datasets record this digest.
    limits = recipe.caption.limits() if recipe.caption.is_on else {}
    config = recipe.pack.model_dump(mode="json") | {"keep": decided.fingerprint}
    return fingerprint("pack/1", config | ({"captions": limits} if limits else {}), [decided])


def _run(dataset: DatasetDir, recipe: ImageRecipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    if 0 in shards:  # once, not for each batch: other decisions make all shards pending
        _delete_beyond(dataset, len(_shards(dataset, recipe)))
    for shard in shards:
        yield pack_shard(dataset, recipe.pack, shard, recipe.caption if recipe.caption.is_on else None)


def _delete_beyond(dataset: DatasetDir, num_shards: int) -> None:
    """Deletes an earlier packing's surplus shards and their latents, because readers list the folders."""
    for shard, entry in numbered_files(dataset.manifest_entry("pack", 0).parent, ".json").items():
        if shard >= num_shards:
            files = (dataset.latents_table, dataset.latents_tar, dataset.packed_table, dataset.packed_tar)
            for path in (dataset.manifest_entry("encode", shard), *(file(shard) for file in files)):
                discard(dataset, path)
            delete_index(dataset.latents_table(shard))
            discard(dataset, entry)


def _drop(dataset: DatasetDir, recipe: ImageRecipe, shard: int, removed: Removed) -> None:
    drop_members(removed.table, removed.uids, _place)
    drop_texts(removed.table, removed.origins, _place)


def _place(tar: Path, sample: SampleIndex) -> dict[str, Any]:
    return image_location(sample)


PACK: Stage[ImageRecipe] = Stage(
    *("pack", _shards, _fingerprint, _run),
    is_on=always_on,
    inputs=dict.fromkeys(("download", "caption", "decide"), "all shards"),
    planned_by="decide",
    num_shards=expected_shards,
    beside=nothing_beside,
    table=Table(
        view="packed",
        comment="Kept samples, and where they lie in the WebDataset shards",
        columns={
            **dict.fromkeys(("uid", "key", "extension"), "VARCHAR"),
            **dict.fromkeys(("picture_offset", "picture_bytes"), "BIGINT"),
            "shard": "INTEGER",
            "tar": "VARCHAR",
        },
        path=DatasetDir.packed_table,
        rewriting=Rewriting(origins={OTHERS: f"unnest({OTHERS})"}, has_tar=True, drop=_drop, recount=count_rows),
    ),
    drops=None,
    uses_gpu=False,
    needs=NOTHING,
    work=WORK["pack"],
)
