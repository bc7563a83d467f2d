"""Tells which part of its image a sample showed in each use."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa

from sdtrain.config import TrainConfig
from sdtrain.dataset.files import read_parquet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.tars import BLOCK_BYTES, members_in, padded
from sdtrain.exposure.exposures import Exposures
from sdtrain.images.crops import resize_and_crop, seeded_uniform
from sdtrain.images.decode import decode_rgb, image_extension
from sdtrain.loading.crops import Crop, crop_number, recorded_crops


def crop_of(exposures: Exposures, use: int) -> Crop | None:
    """The crop of one use; None for a removed sample, where none is recorded, or where the shard is not at hand."""
    uses = exposures.uses
    place = exposures.located.slice(int(uses.places[use]), 1).to_pylist()[0]
    config, epoch = exposures.chain[uses.runs[use]].config, int(uses.epochs[use])
    if place["name"] < 0:
        return None
    folder = Path(place["root"]) / ("dataset" if config.data.online_vae else "latents")
    where = folder / place["table"], place["name"], place["uid"], epoch
    try:
        return _of_image(config, *where) if config.data.online_vae else _of_latent(config, *where)
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _of_latent(config: TrainConfig, table: Path, row: int, uid: str, epoch: int) -> Crop | None:
    rows = _rows(table, ("offset", "num_bytes"))
    begin = padded(sum(column[row - 1].as_py() for column in rows.columns)) if row else 0
    # The latent's numbers begin in the block of the array's header, and before that is the member's own.
    end = rows["offset"][row].as_py() // BLOCK_BYTES * BLOCK_BYTES - BLOCK_BYTES
    crops = recorded_crops(_read(table.with_suffix(".tar"), begin, end))
    info = json.loads(DatasetDir(table.parent.parent).latents_info.read_text())
    number = crop_number(config.seed, uid, epoch, int(info.get("num_crops", 1)))
    return crops[number] if crops else None


def _of_image(config: TrainConfig, table: Path, row: int, uid: str, epoch: int) -> Crop:
    rows = _rows(table, ("key", "picture_offset", "picture_bytes"))
    offset, num_bytes = (rows[name][row].as_py() for name in ("picture_offset", "picture_bytes"))
    content = _read(table.with_suffix(".tar"), offset - BLOCK_BYTES, offset + num_bytes)
    members = {extension: body for name, extension, body in members_in(content) if name == rows["key"][row].as_py()}
    image = decode_rgb(members[image_extension(members)])
    place = seeded_uniform("crop", config.seed, uid, epoch)
    crop = resize_and_crop(image, (config.data.resolution,) * 2, place)
    return Crop(tuple(crop.box), tuple(crop.source_px))


def _rows(table: Path, columns: tuple[str, ...]) -> pa.Table:
    return read_parquet(table, list(columns)).combine_chunks()


def _read(tar: Path, begin: int, end: int) -> bytes:
    with tar.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), max(0, end - begin), begin)
