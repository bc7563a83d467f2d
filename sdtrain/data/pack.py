"""PACK: kept samples -> WebDataset shards of exactly N, in a global shuffle."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.data.config import PackConfig, PictureRecipe
from sdtrain.data.dataset import DatasetDir
from sdtrain.data.files import publish
from sdtrain.data.manifest import ShardReport, describe_outputs, entries, fingerprint, require_entry
from sdtrain.data.pictures import picture_extension
from sdtrain.data.stage import Stage
from sdtrain.data.tars import Member, SampleIndex, index_samples, write_samples

_TABLE = pa.schema(
    [
        *((name, pa.string()) for name in ("uid", "key", "extension")),
        ("picture_offset", pa.int64()),
        ("picture_bytes", pa.int64()),
    ]
)
# Columns of the images tables that travel with the sample.
_PROVENANCE = ("uid", "key", "url", "caption", "width", "height", "original_width", "original_height", "sha256")


@dataclass(frozen=True)
class Source:
    """Where a kept sample's members lie among the downloaded shards."""

    shard: int
    provenance: dict[str, Any]


def pack_shard(dataset: DatasetDir, config: PackConfig, shard: int) -> ShardReport:
    """Copies the samples of one packed shard out of the image shards, without re-encoding."""
    sources = [_source(dataset, *row) for row in _plan(dataset, config)[_part(config, shard)]]
    index = {number: _index(*_stamp(dataset.images_tar(number))) for number in {s.shard for s in sources}}
    bodies = _read_all(dataset, sources, index)
    with publish(dataset.packed_tar(shard)) as temporary:
        written = write_samples(temporary, zip((s.provenance["key"] for s in sources), bodies, strict=True))
    with publish(dataset.packed_table(shard)) as temporary:
        rows = [_row(source, sample) for source, sample in zip(sources, written, strict=True)]
        pq.write_table(pa.Table.from_pylist(rows, _TABLE), temporary, compression="zstd")
    outputs = describe_outputs(dataset, [dataset.packed_tar(shard), dataset.packed_table(shard)])
    return ShardReport(stage="pack", shard=shard, num_in=len(sources), num_out=len(written), outputs=outputs)


def write_index(dataset: DatasetDir) -> Path:
    """Writes dataset/index.json, which lists the finished shards in the form that webdataset's `wids` reads."""
    path = dataset.packed_tar(0).with_name("index.json")
    shards = []
    for entry in entries(dataset, "pack"):
        tar = dataset.packed_tar(entry.shard)
        output = entry.outputs[dataset.relative(tar)]
        shards.append({"url": tar.name, "nsamples": entry.num_out, "filesize": output.bytes, "sha256": output.sha256})
    content = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}
    with publish(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _plan(dataset: DatasetDir, config: PackConfig) -> list[tuple[str, int]]:
    """(key, image shard) of all kept samples, in the order in which they are packed."""
    decisions = dataset.decisions
    return _plan_of(decisions, decisions.stat().st_mtime_ns, config.seed)


@lru_cache(maxsize=2)
def _plan_of(decisions: Path, mtime_ns: int, seed: int) -> list[tuple[str, int]]:
    with duckdb.connect() as connection:
        return connection.execute(
            "SELECT key, shard FROM read_parquet(?) WHERE reason IS NULL ORDER BY md5(uid || ?), uid",
            [str(decisions), str(seed)],
        ).fetchall()


def _part(config: PackConfig, shard: int) -> slice:
    return slice(shard * config.samples_per_shard, (shard + 1) * config.samples_per_shard)


def _source(dataset: DatasetDir, key: str, shard: int) -> Source:
    return Source(shard, _provenance(*_stamp(dataset.images_table(shard)))[key])


def _stamp(path: Path) -> tuple[Path, int]:
    return path, path.stat().st_mtime_ns


@lru_cache(maxsize=64)
def _provenance(table: Path, mtime_ns: int) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in pq.read_table(table, columns=list(_PROVENANCE)).to_pylist()}


@lru_cache(maxsize=64)
def _index(tar: Path, mtime_ns: int) -> dict[str, SampleIndex]:
    return {sample.key: sample for sample in index_samples(tar)}


def _read_all(
    dataset: DatasetDir, sources: Sequence[Source], index: dict[int, dict[str, SampleIndex]]
) -> list[dict[str, bytes]]:
    """The members of each sample; every image shard is opened once and read from front to back."""
    places = defaultdict(list)
    for place, source in enumerate(sources):
        places[source.shard].append(place)
    bodies: list[dict[str, bytes]] = [{} for _ in sources]
    for shard, wanted in sorted(places.items()):
        with dataset.images_tar(shard).open("rb") as file:
            for place in sorted(wanted, key=lambda p: sources[p].provenance["key"]):
                provenance = sources[place].provenance
                members = index[shard][provenance["key"]].members
                extension = picture_extension(members)
                bodies[place] = {
                    extension: _read(file, members[extension]),
                    "txt": (provenance["caption"] or "").encode(),
                    "json": json.dumps(provenance, ensure_ascii=False, sort_keys=True).encode(),
                }
    return bodies


def _read(file: Any, member: Member) -> bytes:
    file.seek(member.offset)
    body: bytes = file.read(member.size)
    return body


def _row(source: Source, written: SampleIndex) -> dict[str, Any]:
    extension = picture_extension(written.members)
    member = written.members[extension]
    names = {"uid": source.provenance["uid"], "key": written.key, "extension": extension}
    return names | {"picture_offset": member.offset, "picture_bytes": member.size}


def _shards(dataset: DatasetDir, recipe: PictureRecipe) -> list[int]:
    kept = require_entry(dataset, "keep", 0).num_out
    return list(range(math.ceil(kept / recipe.pack.samples_per_shard)))


def _fingerprint(dataset: DatasetDir, recipe: PictureRecipe, shard: int) -> str:
    keep = require_entry(dataset, "keep", 0)
    # keep's own fingerprint holds the digests of the image shards: the same decisions may be about other bytes.
    return fingerprint("pack/1", recipe.pack.model_dump(mode="json") | {"keep": keep.fingerprint}, [keep])


def _run(dataset: DatasetDir, recipe: PictureRecipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    _delete_beyond(dataset, len(_shards(dataset, recipe)))
    for shard in shards:
        yield pack_shard(dataset, recipe.pack, shard)


def _delete_beyond(dataset: DatasetDir, num_shards: int) -> None:
    """Deletes packed shards of an earlier, larger packing, and what was encoded from them: readers list the folders."""
    for entry in dataset.manifest_entry("pack", 0).parent.glob("[0-9]*.json"):
        shard = int(entry.stem)
        if shard >= num_shards:
            files = (dataset.latents_table, dataset.latents_tar, dataset.packed_table, dataset.packed_tar)
            for path in (dataset.manifest_entry("encode", shard), *(file(shard) for file in files)):
                path.unlink(missing_ok=True)
            entry.unlink(missing_ok=True)


PACK: Stage[PictureRecipe] = Stage("pack", _shards, _fingerprint, _run)
