"""A finished dataset of many shards with few rows each: real tables and manifest entries, sparse tars, no images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from filters.decide.stage import DECIDE
from filters.dedup import DEDUP
from filters.inspect.report import finish_dataset
from filters.recipe import Recipe
from filters.recipe_record import record_recipe
from filters.score.stage import SCORE
from filters.select.stage import SELECT
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import selected_shards
from sdtrain.dataset.shard_report import Output, ShardReport
from sdtrain.dataset.stage import Stage, run_batch
from sdtrain.download.rows import SCHEMA as IMAGES
from sdtrain.download.stage import DOWNLOAD
from sdtrain.encode.info import VAE_KEY, vae_digest_in, write_info
from sdtrain.encode.stage import ENCODE
from sdtrain.pack.stage import PACK
from sdtrain.settings import parse_settings
from tests.training_fixtures import write_models

ROWS_PER_SHARD = 2
_TAR_BYTES = 1 << 20
_MOMENTS_BYTES = 8 * 8 * 8 * 2
_NO_DIGEST = hashlib.sha256(b"sparse").hexdigest()


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
    _seconds: dict[str, float] = field(default_factory=dict)


def write_world(folder: Path, num_shards: int) -> World:
    """Writes a dataset of `num_shards` image shards; the stages that look over all shards are the real ones."""
    models = write_models(folder / "models")
    metadata = _write_metadata(folder / "metadata", num_shards * ROWS_PER_SHARD)
    world = World(DatasetDir(folder / "data"), _recipe(metadata, models), models)
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


def _recipe(metadata: Path, models: Path) -> Recipe:
    networks = ("clip", "aesthetic", "watermark", "safety")
    content = {
        "name": "scale",
        "select": {
            "metadata": str(metadata),
            "samples_per_shard": ROWS_PER_SHARD,
            "rules": {"min_side": 512, "min_aesthetic": 5.0},
        },
        "score": {f"{name}_weights": None for name in networks},
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
    return hashlib.sha256(f"{stage.name} {path.name}".encode()).hexdigest()


def _sparse(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.truncate(_TAR_BYTES)
    return path


def _table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return path


def _images(world: World) -> Iterator[tuple[int, int, list[Path]]]:

    dataset = world.dataset
    schema = IMAGES
    for name, kind in (("extension", pa.string()), ("picture_offset", pa.int64()), ("picture_bytes", pa.int64())):
        schema = schema.append(pa.field(name, kind))
    for shard in list(selected_shards(dataset)):
        rows = []
        for number, row in enumerate(pq.read_table(dataset.selection(shard)).to_pylist()):
            size = dict.fromkeys(("width", "original_width"), 640) | dict.fromkeys(("height", "original_height"), 512)
            named = {name: row[name] for name in ("uid", "key", "url", "caption")}
            place = {"extension": "jpg", "picture_offset": 512 + 200_000 * number, "picture_bytes": 150_000}
            digest = hashlib.sha256(row["uid"].encode()).hexdigest()
            rows.append(
                dict.fromkeys(schema.names)
                | named
                | size
                | place
                | {"status": "success", "sha256": digest, "size_in_metadata": "same"}
                | {"phash": int.from_bytes(bytes.fromhex(digest[:16]), "big", signed=True)}
            )
        yield shard, len(rows), [_sparse(dataset.images_tar(shard)), _table(dataset.images_table(shard), rows, schema)]


def _scores(world: World) -> Iterator[tuple[int, int, list[Path]]]:
    from filters.score.stage import _TABLE

    dataset = world.dataset
    for shard in list(selected_shards(dataset)):
        rows = []
        for row in pq.read_table(dataset.images_table(shard)).to_pylist():
            rows.append(
                dict.fromkeys(_TABLE.names)
                | {"uid": row["uid"], "key": row["key"], "pixel_sha256": row["sha256"], "phash": row["phash"]}
                | {"thumbnail": bytes(48), "image_width": 640, "image_height": 512}
            )
        yield shard, len(rows), [_table(dataset.scores(shard), rows, _TABLE)]


def _packed(world: World) -> Iterator[tuple[int, int, list[Path]]]:
    from sdtrain.pack.plan import _plan

    dataset = world.dataset
    plan = pq.read_table(_plan(dataset, world.recipe.pack), columns=["uid", "key", "extension", "caption", "url"])
    for shard, first in enumerate(range(0, len(plan), ROWS_PER_SHARD)):
        rows = [
            {"uid": row["uid"], "key": row["key"], "extension": row["extension"]}
            | {"picture_offset": 512 + 200_000 * number, "picture_bytes": 150_000}
            for number, row in enumerate(plan.slice(first, ROWS_PER_SHARD).to_pylist())
        ]
        yield shard, len(rows), [_sparse(dataset.packed_tar(shard)), _table(dataset.packed_table(shard), rows)]


def _latents(world: World) -> Iterator[tuple[int, int, list[Path]]]:
    from sdtrain.pack.plan import _plan

    dataset, recipe = world.dataset, world.recipe
    plan = pq.read_table(_plan(dataset, recipe.pack), columns=["uid", "key", "caption", "url"])
    described = {VAE_KEY: vae_digest_in(dataset, recipe.encode.vae)}
    for shard, first in enumerate(range(0, len(plan), ROWS_PER_SHARD)):
        rows = [
            row | {"offset": 640 + 8192 * number, "num_bytes": _MOMENTS_BYTES, "height": 8, "width": 8}
            for number, row in enumerate(plan.slice(first, ROWS_PER_SHARD).to_pylist())
        ]
        table = pa.Table.from_pylist(rows).replace_schema_metadata(described)
        pq.write_table(table, dataset.latents_table(shard))
        yield shard, len(rows), [_sparse(dataset.latents_tar(shard)), dataset.latents_table(shard)]
