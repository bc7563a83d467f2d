"""Plans packing: each kept sample's packed shard, and its image's location in the downloaded shards."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import duckdb
import pyarrow.parquet as pq

from sdtrain.dataset.config import CaptionConfig, ImageRecipe, PackConfig
from sdtrain.dataset.files import one_process_at_a_time, publish, raise_if_disk_full, scratch, scratch_path
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import entries, read_entry, require_entry, selected_shards
from sdtrain.dataset.shard_report import fingerprint
from sdtrain.dataset.sync import fetch_if_stored, fetch_outputs
from sdtrain.dataset.tables.carried import carried_columns
from sdtrain.dataset.tables.columns import TableColumns
from sdtrain.dataset.tables.connection import connected
from sdtrain.errors import UserError
from sdtrain.pack.captions import CAPTIONS, captions_of_all

PROVENANCE = ("uid", "key", "url", "caption", "width", "height", "original_width", "original_height", "sha256")
"""Columns of the images tables that travel with the sample."""
CARRIED = "carried"
"""The plan's struct of a user's own columns, if the selection carries some; they travel too."""
SHORT = b"sdtrain.short_shards"
"""In the metadata of decisions.parquet, JSON: the number of samples each packed shard has lost since."""

_ORDER = "md5(d.uid || $seed), d.uid"
# One pass over the tables for all packed shards, as each draws from nearly all image shards.
_PLAN = f"""
SELECT d.shard, {", ".join(f"i.{name}" for name in PROVENANCE)}, i.extension, i.picture_offset, i.picture_bytes{{own}}
FROM read_parquet($decisions) d JOIN read_parquet($images) i ON i.uid = d.uid {{joins}}
WHERE d.reason IS NULL ORDER BY {_ORDER}
"""  # noqa: S608 - the names are constants
_PLACES = f"""
SELECT place FROM (
    SELECT d.uid, row_number() OVER (ORDER BY {_ORDER}) - 1 AS place
    FROM read_parquet($decisions) d WHERE d.reason IS NULL
) WHERE uid IN (SELECT unnest($uids))
"""  # noqa: S608
_ROWS_PER_GROUP = 8192
_DIGEST = b"sdtrain.plan"
_ONE_AT_A_TIME = Lock()


def shard_sizes(dataset: DatasetDir, config: PackConfig) -> list[int]:
    """The number of samples in each packed shard: N, or the rest in the last one, less those removed."""
    num_kept, decisions, changed_ns = _decided(dataset)
    return list(_sizes(num_kept, config.samples_per_shard, decisions, changed_ns))


def _decided(dataset: DatasetDir) -> tuple[int, Path, int]:
    """Samples kept, the decisions, and when they last changed."""
    decisions = dataset.decisions
    num_kept = require_entry(dataset, "decide", 0).num_out
    return num_kept, decisions, decisions.stat().st_mtime_ns if decisions.exists() else 0


@lru_cache(maxsize=2)
def _ends(num_kept: int, size: int, decisions: Path, mtime_ns: int) -> tuple[int, ...]:
    """Up to each packed shard's last sample: all samples before; made once, as every shard asks."""
    return tuple(accumulate(_sizes(num_kept, size, decisions, mtime_ns)))


@lru_cache(maxsize=2)
def _sizes(num_kept: int, size: int, decisions: Path, mtime_ns: int) -> tuple[int, ...]:
    short = short_shards(decisions)
    num_places = num_kept + sum(short.values())
    num_shards = math.ceil(num_places / size)
    return tuple(min(size, num_places - size * n) - short.get(n, 0) for n in range(num_shards))


def short_shards(decisions: Path) -> dict[int, int]:
    """The number of samples removed from each packed shard since the decisions."""
    described = (pq.read_schema(decisions).metadata or {}) if decisions.exists() else {}
    return {int(shard): num for shard, num in json.loads(described.get(SHORT, b"{}")).items()}


def expected_shards(dataset: DatasetDir, recipe: ImageRecipe) -> int | None:
    """The number of packed shards, from the manifest alone; None before the decisions."""
    decided = read_entry(dataset, "decide", 0)
    # After removals there may be more shards than the samples would fill.
    recorded = len(entries(dataset, "pack"))
    return max(math.ceil(decided.num_out / recipe.pack.samples_per_shard), recorded) if decided else None


def planned(
    dataset: DatasetDir, config: PackConfig, shard: int, captions: CaptionConfig | None = None
) -> list[dict[str, Any]]:
    """The samples of one packed shard in order: provenance, source shard and offset of the image.

    `captions`: also those of a sample that pass its limits, of a dataset that has the stage `caption`.
    """
    num_kept, decisions, changed_ns = _decided(dataset)
    ends = _ends(num_kept, config.samples_per_shard, decisions, changed_ns)
    return _rows(_plan(dataset, config, captions), ends[shard - 1] if shard else 0, ends[shard])


def num_packed(dataset: DatasetDir, config: PackConfig, uids: Sequence[str]) -> Counter[int]:
    """The number of the given samples in each packed shard, ignoring samples not kept."""
    ends = list(accumulate(shard_sizes(dataset, config)))
    values = {"decisions": str(dataset.decisions), "seed": str(config.seed), "uids": list(uids)}
    with connected(spill=scratch_path(dataset.root, "places")) as connection:
        places = connection.execute(_PLACES, values).fetchall()
    return Counter(bisect_right(ends, place) for (place,) in places)


def shortened(dataset: DatasetDir, config: PackConfig, uids: Sequence[str]) -> dict[bytes, bytes]:
    """For the metadata of decisions.parquet without `uids`: what packing needs to make a lost shard as it was."""
    short = Counter(short_shards(dataset.decisions)) + num_packed(dataset, config, uids)
    return {SHORT: json.dumps({str(shard): number for shard, number in sorted(short.items())}).encode()}


def forget_plan(dataset: DatasetDir) -> None:
    """Deletes the plan, which is rebuilt when needed."""
    dataset.pack_plan.unlink(missing_ok=True)


def _plan(dataset: DatasetDir, config: PackConfig, captions: CaptionConfig | None) -> Path:
    decided = require_entry(dataset, "decide", 0)
    # "keep" was the stage's name; unfinished builds have plans with this digest.
    content = {"seed": config.seed, "keep": decided.fingerprint} | (
        {CAPTIONS: captions.limits() or True} if captions else {}
    )
    digest = fingerprint("plan/1", content, [decided])
    path = dataset.pack_plan
    with _ONE_AT_A_TIME, one_process_at_a_time(path.parent):
        if not path.exists() or (_groups(path, *_stamp(path))[0].metadata or {}).get(_DIGEST) != digest.encode():
            _write_plan(dataset, config, digest, captions)
        return path


def _write_plan(dataset: DatasetDir, config: PackConfig, digest: str, captions: CaptionConfig | None) -> None:
    plan, values = _query(dataset, captions is not None)
    values |= {
        "decisions": str(dataset.decisions),
        "images": [str(dataset.images_table(shard)) for shard in selected_shards(dataset)],
        "seed": str(config.seed),
        "target": "",
    }
    with (
        publish(dataset.pack_plan) as temporary,
        scratch(dataset.root, "plan") as folder,
        connected(spill=folder) as connection,
    ):
        values["target"] = str(temporary)
        if captions:
            connection.register("all_captions", captions_of_all(dataset, captions))
        options = f"FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {_ROWS_PER_GROUP}"
        try:
            # No user input is interpolated: the digest is hexadecimal.
            written = f"COPY ({plan}) TO $target ({options}, KV_METADATA {{'{_DIGEST.decode()}': '{digest}'}})"
            connection.execute(written, values)
        except duckdb.Error as error:
            raise_if_disk_full(error, dataset.pack_plan)
            raise UserError(_unreadable(dataset, error)) from error


def _query(dataset: DatasetDir, with_captions: bool) -> tuple[str, dict[str, Any]]:
    """Returns the plan's SQL, with a struct of the carried columns if there are any, and the values of their tables."""
    captions = f", c.{CAPTIONS}" if with_captions else ""
    join = "LEFT JOIN all_captions c ON c.uid = d.uid" if with_captions else ""
    selections = [dataset.selection(shard) for shard in selected_shards(dataset)]
    fetch_if_stored(dataset, *selections[:1])  # not an input of the stage: only what is carried needs all of them
    names = carried_columns(selections[0]) if selections else []
    if not names:
        return _PLAN.format(own=captions, joins=join), {}
    fetch_outputs(dataset, "select", tars=False)
    scan = TableColumns(dataset).scan(selections, "selection")
    # `select.carry` allows no quotes in a name.
    own = ", ".join(f"'{name}': s.\"{name}\"" for name in names)
    carried = f"JOIN ({scan.sql}) s ON s.uid = d.uid"
    return _PLAN.format(own=f", {{{own}}} AS {CARRIED}{captions}", joins=f"{carried} {join}"), scan.values


def _unreadable(dataset: DatasetDir, error: duckdb.Error) -> str:
    return (
        f"The tables in {dataset.images_table(0).parent} cannot be read as they must be for packing "
        f"({str(error).splitlines()[0]}). If one is missing, run the build again: it downloads the shard again. If "
        "they are of an older version, delete the folder first."
    )


def _rows(plan: Path, begin: int, end: int) -> list[dict[str, Any]]:
    """Rows [begin, end), reading only the row groups that hold them."""
    metadata, ends = _groups(plan, *_stamp(plan))
    rows, number = list[dict[str, Any]](), bisect_right(ends, begin)
    with pq.ParquetFile(plan, metadata=metadata) as file:
        while number < len(ends) and (first := ends[number - 1] if number else 0) < end:
            low = max(begin - first, 0)
            rows += file.read_row_group(number).slice(low, end - first - low).to_pylist()
            number += 1
    return rows


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


@lru_cache(maxsize=1)
def _groups(plan: Path, inode: int, mtime_ns: int) -> tuple[pq.FileMetaData, Sequence[int]]:
    """The plan's footer, and the rows up to each group's end; read once, as both grow with the number of shards."""
    metadata = pq.read_metadata(plan)
    return metadata, list(accumulate(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)))
