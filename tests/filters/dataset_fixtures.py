"""A small finished dataset with one sample of every status, made without network and models."""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq

from filters.recipe import DecideConfig, Recipe
from filters.select.stage import SELECT
from filters.select_config import SelectConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, write_entry
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import run_batch
from sdtrain.download.rows import SCHEMA

NUM_ROWS = 40
# Position in download order -> why it is dropped there; all others are kept.
DOWNLOAD = {0: "http_404", 1: "http_404", 2: "timeout", 15: "not_an_image"}
UNDECODABLE = {3: "undecodable"}
DECIDE = {4: "min_side", 5: "duplicate_exact", 16: "min_side"}
PER_SHARD = 15


def make_dataset(folder):
    """Returns (dataset, recipe)."""
    metadata = folder / "metadata.parquet"
    numbers = range(NUM_ROWS)
    pq.write_table(
        pa.table({
            "URL": [f"https://host{i % 3}.example/photo-{i:05d}.jpg" for i in numbers],
            "TEXT": [f"caption {i}" for i in numbers],
            "WIDTH": [600] * NUM_ROWS,
            "HEIGHT": [100] * 5 + [700] * (NUM_ROWS - 5),
            "AESTHETIC_SCORE": [6.0] * NUM_ROWS,
        }),
        metadata,
    )  # fmt: skip
    select = SelectConfig(metadata=str(metadata), rules={"min_side": 512}, samples_per_shard=PER_SHARD)
    recipe = Recipe(name="small", select=select, decide=DecideConfig(rules={"min_side": 512}))
    dataset = DatasetDir(folder / "data")
    run_batch(SELECT, dataset, recipe, [0])
    rows = [row for shard in range(3) for row in pq.read_table(dataset.selection(shard)).to_pylist()]
    for shard in range(3):
        _write_shard(dataset, shard, rows[shard * PER_SHARD : (shard + 1) * PER_SHARD])
    _write_whole(dataset, rows)
    return dataset, recipe


def _statuses(positions):
    return [(DOWNLOAD.get(p), UNDECODABLE.get(p), DECIDE.get(p)) for p in positions]


def _write_shard(dataset, shard, rows):
    statuses = _statuses(range(shard * PER_SHARD, shard * PER_SHARD + len(rows)))
    images = [
        {
            **{name: row[name] for name in ("url", "caption", "uid", "key")},
            "status": "failed_to_download" if reason else "success",
            "reason": reason,
            "error_message": f"{reason}: detail" if reason else None,
            **({} if reason else {"original_width": 600, "original_height": 700}),
        }
        for row, (reason, _, _) in zip(rows, statuses, strict=True)
    ]
    _finish(dataset, "download", shard, {dataset.images_table(shard): (images, SCHEMA)}, [f[0] for f in statuses])
    got = [(row, status) for row, status in zip(rows, statuses, strict=True) if not status[0]]
    scores = [{"uid": r["uid"], "key": r["key"], "aesthetic": 5.5, "reason": f[1]} for r, f in got]
    schema = pa.schema(
        [("uid", pa.string()), ("key", pa.string()), ("aesthetic", pa.float32()), ("reason", pa.string())]
    )
    _finish(dataset, "score", shard, {dataset.scores(shard): (scores, schema)}, [status[1] for _, status in got])


def _write_whole(dataset, rows):
    reasons = [next(filter(None, status), None) for status in _statuses(range(len(rows)))]
    decisions = [
        {"uid": row["uid"], "key": row["key"], "shard": i // PER_SHARD, "reason": reason}
        for i, (row, reason) in enumerate(zip(rows, reasons, strict=True))
    ]
    text = pa.string()
    schema = pa.schema([("uid", text), ("key", text), ("shard", pa.int32()), ("reason", text)])
    copies = [{"uid": row["uid"], "group_id": rows[5]["uid"], "kind": "exact"} for row in rows[5:7]]
    pair = pa.schema([("uid", text), ("group_id", text), ("kind", text)])
    _finish(dataset, "dedup", 0, {dataset.duplicates: (copies, pair)}, [None] * len(rows))
    _finish(dataset, "decide", 0, {dataset.decisions: (decisions, schema)}, reasons)
    kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    latents = [
        {**{n: row[n] for n in ("uid", "key", "caption", "url")}, "offset": 512 * i, "num_bytes": 1024}
        for i, row in enumerate(kept)
    ]
    longs = [("offset", pa.int64()), ("num_bytes", pa.int64())]
    schema = pa.schema([*((n, text) for n in ("uid", "key", "caption", "url")), *longs])
    _finish(dataset, "encode", 0, {dataset.latents_table(0): (latents, schema)}, [None] * len(kept))


def _finish(dataset, stage, shard, tables, reasons):
    for path, (rows, schema) in tables.items():
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema), path)
    counts = Counter(reasons)
    num_out = counts.pop(None, 0)
    outputs = describe_outputs(dataset, tables)
    write_entry(
        dataset,
        ShardReport(
            stage=stage, shard=shard, num_in=len(reasons), num_out=num_out, dropped=counts, outputs=outputs, seconds=1.5
        ),
    )
