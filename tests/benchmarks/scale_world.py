"""A finished dataset of many shards with few rows each: real tables and manifest entries, sparse tars, no images."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from filters.decide.stage import DECIDE
from filters.dedup import DEDUP
from filters.inspect.report import finish_dataset
from filters.recipe import Recipe
from filters.recipe_record import record_recipe
from filters.score.stage import SCORE, _described
from filters.score.stage import _schema as scores_schema
from filters.select.stage import SELECT
from sdtrain.dataset.files import sha256_of
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import selected_shards
from sdtrain.dataset.shard_report import Output, ShardReport
from sdtrain.dataset.stage import Stage, run_batch
from sdtrain.dataset.tars import SampleIndex, write_samples
from sdtrain.download.image_shards import TABLE as IMAGES
from sdtrain.download.image_shards import image_location
from sdtrain.download.stage import DOWNLOAD
from sdtrain.encode.info import VAE_KEY, vae_digest_in, write_info
from sdtrain.encode.shard_encoder import latent_offset
from sdtrain.encode.stage import _TABLE as LATENTS
from sdtrain.encode.stage import ENCODE
from sdtrain.pack.plan import planned
from sdtrain.pack.stage import _TABLE as PACKED
from sdtrain.pack.stage import PACK
from sdtrain.settings import parse_settings
from tests.training_fixtures import write_models

ROWS_PER_SHARD = 2
_TAR_BYTES = 1 << 20
_MOMENTS = np.full((8, 8, 8), -1, np.float16)
_EMBEDDED = {"clip_model": "ViT-demo", "clip_weights": "random:0", "store_embeddings": True}
NUM_REAL = 100
"""Samples of the first shards whose tars are real wherever they lie, so that they can be removed and encoded."""


@dataclass(frozen=True)
class World:
    """A dataset as a build leaves it.

    Attributes:
        dataset: the directory.
        recipe: it was built with.
        models: VAE and text encoder, in a diffusers folder.
    """

    dataset: DatasetDir
    recipe: Recipe
    models: Path


def write_world(folder: Path, num_shards: int, embedded: bool = False) -> World:
    """Writes a dataset of `num_shards` image shards; the stages that look over all shards are the real ones.

    `embedded` gives each image a random embedding, as of the demo's CLIP.
    """
    models = write_models(folder / "models")
    metadata = _write_metadata(folder / "metadata", num_shards * ROWS_PER_SHARD)
    world = World(DatasetDir(folder / "data"), _recipe(metadata, models, embedded), models)
    dataset, recipe = world.dataset, world.recipe
    record_recipe(dataset, recipe)
    run_batch(SELECT, dataset, recipe, [0])
    _finish(DOWNLOAD, world, _images(world))
    _finish(SCORE, world, _scores(world))
    for stage in (DEDUP, DECIDE):
        run_batch(stage, dataset, recipe, [0])
    _finish(PACK, world, _packed(world))
    dataset.latents_info.parent.mkdir(exist_ok=True)
    write_info(dataset, recipe.encode, 0)
    _finish(ENCODE, world, _latents(world))
    finish_dataset(dataset, recipe)
    return world


@lru_cache(maxsize=1)
def real_uids(dataset: DatasetDir) -> tuple[str, ...]:
    """The uids of the samples whose tars are real, in order."""
    shards = range(NUM_REAL // ROWS_PER_SHARD)
    return tuple(uid for shard in shards for uid in pq.read_table(dataset.selection(shard))["uid"].to_pylist())


def _recipe(metadata: Path, models: Path, embedded: bool) -> Recipe:
    networks = ("clip", "aesthetic", "watermark", "safety")
    content = {
        "name": "scale",
        "select": {
            "metadata": str(metadata),
            "samples_per_shard": ROWS_PER_SHARD,
            "rules": {"min_side": 512, "min_aesthetic": 5.0},
        },
        "score": {f"{name}_weights": None for name in networks} | (_EMBEDDED if embedded else {}),
        "duplicates": {"level": "exact"},
        "decide": {"rules": {"min_side": 256, "min_aesthetic": 5.0}},
        "pack": {"samples_per_shard": ROWS_PER_SHARD},
        "encode": {"vae": str(models), "resolution": 64},
    }
    return parse_settings(Recipe, content, "scale")


def _write_metadata(folder: Path, num_rows: int) -> Path:
    folder.mkdir(parents=True)
    numbers = range(num_rows)
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "URL": [f"https://host{number % 997}.example/{number}.jpg" for number in numbers],
            "TEXT": [f"photograph number {number}" for number in numbers],
            "WIDTH": np.full(num_rows, 640, np.int32),
            "HEIGHT": np.full(num_rows, 512, np.int32),
            "similarity": np.full(num_rows, 0.3),
            "pwatermark": rng.uniform(0, 0.4, num_rows),
            "punsafe": rng.uniform(0, 0.1, num_rows),
            "AESTHETIC_SCORE": rng.uniform(5.1, 8, num_rows),
        }
    )
    pq.write_table(table, folder / "part-0.parquet")
    return folder


def _finish(stage: Stage[Recipe], world: World, files: Iterator[tuple[int, int, list[Path]]]) -> None:
    """Records shards as finished; without fsync and digests of contents, which nothing here asks for."""
    dataset = world.dataset
    dataset.manifest_entry(stage.name, 0).parent.mkdir(parents=True)
    for shard, num_rows, paths in files:
        outputs = {dataset.relative(p): Output(sha256=_digest(stage, p), bytes=p.stat().st_size) for p in paths}
        report = ShardReport(
            stage=stage.name, shard=shard, num_in=num_rows, num_out=num_rows, outputs=outputs, seconds=60.0
        )
        digest = stage.fingerprint(dataset, world.recipe, shard)
        times = {"fingerprint": digest, "finished_at": 1.8e9 + shard}
        entry = report.model_copy(update=times).model_dump_json(indent=1)
        dataset.manifest_entry(stage.name, shard).write_text(entry + "\n")


def _digest(stage: Stage[Recipe], path: Path) -> str:
    return (
        sha256_of(path) if path.stat().st_blocks else hashlib.sha256(f"{stage.name} {path.name}".encode()).hexdigest()
    )


Rows = list[dict[str, Any]]


def _write_tar(
    path: Path, rows: Rows, real: set[str], members: Callable[[dict[str, Any]], dict[str, bytes]]
) -> list[SampleIndex]:
    """A tar with the samples if one of them must be real; else an empty one of the same length, and no index."""
    path.parent.mkdir(exist_ok=True)
    if real.isdisjoint(row["uid"] for row in rows):
        with path.open("wb") as file:
            file.truncate(_TAR_BYTES)
        return []
    return write_samples(path, ((row["key"], members(row)) for row in rows))


def _with_places(rows: Rows, index: list[SampleIndex]) -> Rows:
    nominal = [
        {"extension": "jpg", "picture_offset": 512 + 200_000 * n, "picture_bytes": 150_000} for n in range(len(rows))
    ]
    places = [image_location(sample) for sample in index] or nominal
    return [row | place for row, place in zip(rows, places, strict=True)]


def _table(path: Path, rows: Rows, schema: pa.Schema | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return path


def _jpeg(uid: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), f"#{uid[:6]}").save(file, "JPEG")
    return file.getvalue()


def _members(row: dict[str, Any]) -> dict[str, bytes]:
    return {"jpg": _jpeg(row["uid"]), "txt": row["caption"].encode(), "json": json.dumps(row, default=str).encode()}


def _images(world: World) -> Iterator[tuple[int, int, list[Path]]]:
    dataset = world.dataset
    for shard in selected_shards(dataset):
        rows = [_image_row(row) for row in pq.read_table(dataset.selection(shard)).to_pylist()]
        tar = dataset.images_tar(shard)
        index = _write_tar(tar, rows, set(real_uids(world.dataset)), _members)
        yield shard, len(rows), [tar, _table(dataset.images_table(shard), _with_places(rows, index), IMAGES)]


def _image_row(row: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(row["uid"].encode()).hexdigest()
    return {
        **dict.fromkeys(IMAGES.names),
        **{name: row[name] for name in ("uid", "key", "url", "caption")},
        **dict.fromkeys(("width", "original_width"), 640),
        **dict.fromkeys(("height", "original_height"), 512),
        **{"status": "success", "sha256": digest, "size_in_metadata": "same"},
        "phash": int.from_bytes(bytes.fromhex(digest[:16]), "big", signed=True),
    }


def _scores(world: World) -> Iterator[tuple[int, int, list[Path]]]:
    dataset, config, rng = world.dataset, world.recipe.score, np.random.default_rng(1)
    schema = scores_schema(config).with_metadata(_described(config, "cpu", on_gpu=False))
    for shard in selected_shards(dataset):
        rows = [
            {**dict.fromkeys(schema.names), "uid": row["uid"], "key": row["key"], "pixel_sha256": row["sha256"]}
            | {"phash": row["phash"], "thumbnail": bytes(48), "image_width": 640, "image_height": 512}
            for row in pq.read_table(dataset.images_table(shard)).to_pylist()
        ]
        if "embedding" in schema.names:
            width = schema.field("embedding").type.list_size
            rows = [row | {"embedding": rng.standard_normal(width).astype(np.float16)} for row in rows]
        yield shard, len(rows), [_table(dataset.scores(shard), rows, schema)]


def _packed(world: World) -> Iterator[tuple[int, int, list[Path]]]:
    dataset = world.dataset
    for shard, rows in _planned(world):
        tar = dataset.packed_tar(shard)
        index = _write_tar(tar, rows, set(real_uids(world.dataset)), _members)
        own = [{name: row[name] for name in PACKED.names} for row in _with_places(rows, index)]
        yield shard, len(rows), [tar, _table(dataset.packed_table(shard), own, PACKED)]


def _latents(world: World) -> Iterator[tuple[int, int, list[Path]]]:
    dataset = world.dataset
    schema = LATENTS.with_metadata({VAE_KEY: vae_digest_in(dataset, world.recipe.encode.vae)})
    for shard, rows in _planned(world):
        tar = dataset.latents_tar(shard)
        index = _write_tar(tar, rows, set(real_uids(world.dataset)), _moments)
        nominal = [{"offset": 640 + 8192 * number} for number in range(len(rows))]
        places = [latent_offset(tar, sample) for sample in index] or nominal
        size = {"num_bytes": _MOMENTS.nbytes, "height": 8, "width": 8}
        own = [
            {name: row.get(name) for name in LATENTS.names} | place | size
            for row, place in zip(rows, places, strict=True)
        ]
        yield shard, len(rows), [tar, _table(dataset.latents_table(shard), own, schema)]


def _moments(row: dict[str, Any]) -> dict[str, bytes]:
    file = io.BytesIO()
    np.save(file, _MOMENTS)
    return _members(row) | {"moments.npy": file.getvalue()}


def _planned(world: World) -> Iterator[tuple[int, Rows]]:
    """The rows of each packed shard, as the plan has them; read once, because the real one is asked shard by shard."""
    planned(world.dataset, world.recipe.pack, 0)
    plan = pq.read_table(world.dataset.pack_plan)
    for shard, first in enumerate(range(0, len(plan), ROWS_PER_SHARD)):
        yield shard, plan.slice(first, ROWS_PER_SHARD).to_pylist()
