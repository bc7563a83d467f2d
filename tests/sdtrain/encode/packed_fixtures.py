"""A small dataset of packed images, and the part of a recipe that encodes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.dataset.config import EncodeConfig, PackConfig
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, write_entry
from sdtrain.dataset.shard_report import ShardReport
from sdtrain.dataset.stage import pending, run_batch
from sdtrain.dataset.tars import write_samples
from sdtrain.download.image_shards import image_location
from sdtrain.encode.stage import ENCODE
from tests.image_fixtures import encoded, scene_image

RESOLUTION = 64
NUM_SAMPLES = (5, 3)


class Recipe:
    """The part of a recipe that encoding reads."""

    def __init__(self, vae: Path, **settings):
        self.pack = PackConfig(samples_per_shard=NUM_SAMPLES[0])
        self.encode = EncodeConfig(**{"vae": str(vae), "resolution": RESOLUTION, "batch_size": 2} | settings)


def write_packed(
    root: Path,
    damaged: bool = False,
    size_of: Callable[[int], tuple[int, int]] = lambda number: (90 + 7 * number, 120),
    extension: str = "jpg",
) -> DatasetDir:
    """A dataset that is packed into two shards."""
    dataset = DatasetDir(root)
    number = 0
    for shard, num_samples in enumerate(NUM_SAMPLES):
        samples = []
        for _ in range(num_samples):
            image = encoded(scene_image(number, *size_of(number)))
            names = {"uid": f"{number:032x}", "key": f"{number:09d}", "url": f"https://a.example/{number}.jpg"}
            provenance = names | {"caption": f"Bild {number}", "sha256": "0" * 64}
            members = {extension: image[: 600 if damaged else None], "txt": provenance["caption"].encode()}
            samples.append((names["key"], members | {"json": json.dumps(provenance).encode()}))
            number += 1
        dataset.packed_tar(shard).parent.mkdir(parents=True, exist_ok=True)
        written = write_samples(dataset.packed_tar(shard), samples)
        rows = [
            {"uid": json.loads(members["json"])["uid"], "key": key} | image_location(place)
            for (key, members), place in zip(samples, written, strict=True)
        ]
        pq.write_table(pa.Table.from_pylist(rows), dataset.packed_table(shard))
        report = ShardReport(stage="pack", shard=shard, num_in=num_samples, num_out=num_samples)
        outputs = describe_outputs(dataset, [dataset.packed_tar(shard), dataset.packed_table(shard)])
        write_entry(dataset, report.model_copy(update={"outputs": outputs}))
    pq.write_table(pa.table({"uid": pa.array([], pa.string())}), dataset.decisions)
    write_entry(dataset, ShardReport(stage="decide", shard=0, num_in=number, num_out=number))
    return dataset


def encode(dataset: DatasetDir, recipe: Recipe) -> list[ShardReport]:
    return run_batch(ENCODE, dataset, recipe, pending(ENCODE, dataset, recipe))
