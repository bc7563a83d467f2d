"""img2dataset's shards made reproducible: the same answers of the web give the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.data.dataset import DatasetDir
from sdtrain.data.failures import reason_of
from sdtrain.data.files import publish
from sdtrain.data.tars import index_samples, write_samples
from sdtrain.errors import UserError

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("url", "caption", "uid", "key", "status", "error_message")),
        *((name, pa.int32()) for name in ("width", "height", "original_width", "original_height")),
        *((name, pa.string()) for name in ("exif", "sha256", "reason")),
    ]
)


@dataclass(frozen=True)
class RawShard:
    """What img2dataset left in a temporary folder."""

    shard: int
    tar: Path
    table: Path
    stats: Path


def raw_shard(folder: Path, shard: int) -> RawShard:
    """The three files of one shard as img2dataset names them."""
    name = folder / f"{shard:05d}"
    return RawShard(shard, name.with_suffix(".tar"), name.with_suffix(".parquet"), folder / f"{shard:05d}_stats.json")


def publish_shard(dataset: DatasetDir, raw: RawShard, selected_keys: list[str]) -> Counter[str | None]:
    """Sorts a raw shard by key, adds reasons and publishes table, tar and statistics.

    Returns:
        How many rows have each reason; under None, how many pictures there are.

    Raises:
        UserError: img2dataset lost samples, or its files are damaged.
    """
    table = _with_reasons(pq.read_table(raw.table))
    members = {sample.key: sample.members for sample in index_samples(raw.tar)}
    keys, reasons = table["key"].to_pylist(), table["reason"].to_pylist()
    _check(raw, "rows", keys, selected_keys)
    _check(raw, "pictures", sorted(members), [k for k, reason in zip(keys, reasons, strict=True) if reason is None])

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        with raw.tar.open("rb") as file:
            for key in sorted(members):
                bodies = {}
                for extension, member in members[key].items():
                    file.seek(member.offset)
                    bodies[extension] = file.read(member.size)
                yield key, bodies

    with publish(dataset.images_tar(raw.shard)) as temporary:
        write_samples(temporary, samples())
    with publish(dataset.images_table(raw.shard)) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=max(1, len(table)))
    with publish(dataset.images_stats(raw.shard)) as temporary:
        temporary.write_bytes(raw.stats.read_bytes())
    return Counter(reasons)


def _with_reasons(raw: pa.Table) -> pa.Table:
    raw = raw.sort_by("key")
    judged = [
        (None, None) if status == "success" else reason_of(status, message)
        for status, message in zip(raw["status"].to_pylist(), raw["error_message"].to_pylist(), strict=True)
    ]
    reasons, messages = zip(*judged, strict=True)
    ours = {"reason": pa.array(reasons, pa.string()), "error_message": pa.array(messages, pa.string())}
    return pa.table([ours[name] if name in ours else raw[name] for name in SCHEMA.names], schema=SCHEMA)


def _check(raw: RawShard, what: str, found: list[str], expected: list[str]) -> None:
    if found == expected:
        return
    lost, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    examples = ", ".join((lost or extra)[:3])
    raise UserError(
        f"img2dataset lost samples of shard {raw.shard:05d}: {len(found)} {what} where {len(expected)} are due "
        f"({len(lost)} missing, {len(extra)} too many: {examples}). Nothing of the shard was kept; run the build "
        "again, and look into the disk's free space if it comes back."
    )
