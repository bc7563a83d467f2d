"""Datasets whose images are already fetched, made without network; for the tests of the stages behind `download`."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, write_entry
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.tars import write_samples
from sdtrain.demo.images import SEEN_PAIRS, draw, random_scene
from sdtrain.download.image_shards import TABLE, image_location

_SELECTION = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "uid", "url", "caption")),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("similarity", pa.float64()),
        ("hash", pa.int64()),
        *((name, pa.float64()) for name in ("pwatermark", "punsafe", "aesthetic")),
    ]
)


@dataclass(frozen=True)
class Fetched:
    """What became of one selected row.

    Attributes:
        image: the stored image's bytes; None where the download failed.
        original_px: the size before it was stored.
        scores: LAION's, as the metadata has them.
        reason: why the download failed.
        extension: of the image's file.
    """

    image: bytes | None
    caption: str | None = "an image"
    original_px: tuple[int, int] | None = (600, 600)
    scores: dict[str, float] | None = None
    reason: str | None = None
    extension: str = "jpg"


def encoded(image: Image.Image, form: str = "jpeg", **options: Any) -> bytes:
    """The bytes of an encoded image."""
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 95} if form == "jpeg" else {}) | options)
    return buffer.getvalue()


def scene_image(seed: int, width_px: int = 96, height_px: int = 80) -> Image.Image:
    """A random scene of the demo's world; the same seed gives the same pixels."""
    rng = np.random.default_rng(seed)
    return draw(random_scene(rng, *SEEN_PAIRS[seed % len(SEEN_PAIRS)]), width_px, height_px)


def write_downloads(root: Path, rows: list[Fetched], per_shard: int = 10) -> DatasetDir:
    """A dataset whose stages `select` and `download` are finished, with these rows."""
    dataset = DatasetDir(root)
    selections = []
    for shard in range(-(-len(rows) // per_shard)):
        part = rows[shard * per_shard : (shard + 1) * per_shard]
        chosen = [_selected(shard * per_shard + i, f"{100_000 * shard + i:09d}", row) for i, row in enumerate(part)]
        selections.append(dataset.selection(shard))
        _write_table(dataset.selection(shard), chosen, _SELECTION)
        _write_images(dataset, shard, chosen, part)
    report = ShardReport(stage="select", shard=0, num_in=len(rows), num_out=len(rows))
    write_entry(dataset, report.model_copy(update={"outputs": describe_outputs(dataset, selections)}))
    return dataset


def _selected(number: int, key: str, row: Fetched) -> dict[str, Any]:
    url = f"https://host{number % 3}.example/{number}.jpg"
    uid = hashlib.md5(f"{url}\n{row.caption}".encode()).hexdigest()
    return {"key": key, "uid": uid, "url": url, "caption": row.caption, "width": 600, "height": 600} | (
        row.scores or {}
    )


def _write_images(dataset: DatasetDir, shard: int, chosen: list[dict[str, Any]], rows: list[Fetched]) -> None:
    table, samples, dropped = [], [], dict[str, int]()
    for selected, row in zip(chosen, rows, strict=True):
        described = {name: selected[name] for name in ("url", "caption", "uid", "key")}
        if row.image is None:
            reason = row.reason or "http_404"
            dropped[reason] = dropped.get(reason, 0) + 1
            table.append(described | {"status": "failed_to_download", "reason": reason})
            continue
        width, height = row.original_px or (None, None)
        described |= {"sha256": hashlib.sha256(row.image).hexdigest(), "status": "success"}
        table.append(described | {"original_width": width, "original_height": height, "width": 96, "height": 80})
        members = {
            row.extension: row.image,
            "txt": (row.caption or "").encode(),
            "json": json.dumps(described).encode(),
        }
        samples.append((selected["key"], members))
    dataset.images_tar(shard).parent.mkdir(exist_ok=True)
    places = {sample.key: image_location(sample) for sample in write_samples(dataset.images_tar(shard), samples)}
    _write_table(dataset.images_table(shard), [row | places.get(row["key"], {}) for row in table], TABLE)
    outputs = describe_outputs(dataset, [dataset.images_tar(shard), dataset.images_table(shard)])
    report = {"stage": "download", "shard": shard, "num_in": len(rows), "num_out": len(samples), "dropped": dropped}
    write_entry(dataset, ShardReport.model_validate(report | {"outputs": outputs}))


def _write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
