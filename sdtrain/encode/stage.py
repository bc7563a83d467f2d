"""The stage ENCODE: packed images -> the VAE's posterior moments, with captions and provenance."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sdtrain.dataset.config import EncodeConfig, ImageRecipe
from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir, delete_index
from sdtrain.dataset.manifest import describe_outputs, require_entry
from sdtrain.dataset.rewriting import Removed, Rewriting, count_rows, drop_members
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import Needs, Openers, Stage, Table, always_on, no_openers
from sdtrain.dataset.sync import fetch_shard_file
from sdtrain.dataset.tars import read_samples, write_samples
from sdtrain.dataset.work import WORK
from sdtrain.encode.check import DecodeQuality, chosen_rows, measure, require_good
from sdtrain.encode.info import (
    CHECK_KEY,
    ROWS_KEY,
    SIZES_KEY,
    TEXT_KEY,
    VAE_KEY,
    describe_rows,
    sizes_px,
    vae_digest_in,
    write_info,
)
from sdtrain.encode.shard_encoder import ShardEncoder, latent_offset
from sdtrain.encode.text import check_text_embedder
from sdtrain.encode.vae import check_vae
from sdtrain.formats.digests import compute_vae_digest
from sdtrain.pack.captions import CAPTIONS, LIST, describe_sources, drop_texts, has_captions
from sdtrain.pack.plan import expected_shards
from sdtrain.pack.stage import PACK

_DECIDE_BYTES = {"text_embeddings", "precision", "crop", "num_crops", "buckets", "bucket_step_px", "bucket_max_aspect"}
_TABLE = pa.schema(
    [
        *((name, pa.string()) for name in ("uid", "key", "caption", "url")),
        ("offset", pa.int64()),
        ("num_bytes", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)
_ORIGINS = {CAPTIONS: f"unnest(list_transform({CAPTIONS}, each_one -> each_one.origin_uid))"}


def encode_shard(dataset: DatasetDir, config: EncodeConfig, shard: int) -> ShardReport:
    """Writes and checks the latents of one packed shard.

    UserError if the packed shard or the VAE cannot be read, or the latents do not reproduce their images.
    """
    source = dataset.packed_tar(shard)
    entry = require_entry(dataset, "pack", shard)
    fetch_shard_file(dataset.root, source, "pack")
    with_captions = has_captions(dataset.packed_table(shard))
    encoder = ShardEncoder(config, source, chosen_rows(entry.num_out, config, shard), with_captions)
    with publish(dataset.latents_tar(shard)) as temporary:
        index = write_samples(temporary, encoder.encoded(read_samples(source)))
        placed = [row | latent_offset(temporary, sample) for row, sample in zip(encoder.rows, index, strict=True)]
        quality = _checked(temporary, placed, encoder, config)
    described = _described(dataset, placed, config, quality, with_captions)
    table = pa.Table.from_pylist(placed, _schema(config, with_captions).with_metadata(described))
    with publish(dataset.latents_table(shard)) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    delete_index(dataset.latents_table(shard))
    write_info(dataset, config, shard)
    outputs = describe_outputs(dataset, [dataset.latents_tar(shard), dataset.latents_table(shard)])
    return ShardReport(stage="encode", shard=shard, num_in=len(placed), num_out=len(table), outputs=outputs)


def _schema(config: EncodeConfig, with_captions: bool) -> pa.Schema:
    table = _TABLE if config.text_embeddings == "none" else _TABLE.append(pa.field("text_offset", pa.int64()))
    return table.append(pa.field(CAPTIONS, LIST)) if with_captions else table


def _checked(
    tar: Path, rows: Sequence[dict[str, Any]], encoder: ShardEncoder, config: EncodeConfig
) -> DecodeQuality | None:
    """Decodes the chosen latents as stored in the file."""
    if not encoder.pixels:
        return None
    moments = []
    with tar.open("rb") as file:
        for row in (rows[number] for number in encoder.pixels):
            file.seek(row["offset"])
            content = file.read(row["num_bytes"] // config.num_crops)
            moments.append(np.frombuffer(content, np.float16).reshape(-1, row["height"], row["width"]))
    quality = measure(encoder.vae, moments, list(encoder.pixels.values()))
    require_good(quality, config, encoder.vae, str(encoder.source))
    return quality


def _described(
    dataset: DatasetDir,
    rows: Sequence[dict[str, Any]],
    config: EncodeConfig,
    quality: DecodeQuality | None,
    with_captions: bool,
) -> dict[str, str]:
    """The table's own metadata."""
    described = {VAE_KEY: vae_digest_in(dataset, config.vae), ROWS_KEY: _rows_digest(rows, with_captions)}
    if with_captions:
        described |= describe_sources(row[CAPTIONS] for row in rows)
    if digests := _text_digests(config):
        described[TEXT_KEY] = digests[0]
    if len(sizes := sizes_px(config)) > 1:
        sides = [(8 * row["width"], 8 * row["height"]) for row in rows]
        described[SIZES_KEY] = json.dumps([sides.count(size) for size in sizes])
    if quality:
        described[CHECK_KEY] = json.dumps(quality.as_dict())
    return described


def _rows_digest(rows: Sequence[dict[str, Any]], with_captions: bool) -> str:
    names = ("uid", "caption", "offset", *((CAPTIONS,) if with_captions else ()))
    return describe_rows(*([row[name] for row in rows] for name in names))


def drop_latents(table: Path, uids: Collection[str], origins: Collection[str] = ()) -> None:
    """Takes samples out of a shard of latents, and the others' captions that come from `origins`.

    See `sdtrain.dataset.rewriting`.
    """
    drop_members(table, uids, latent_offset)
    drop_texts(table, origins, latent_offset, lambda rows: {ROWS_KEY: _rows_digest(rows, with_captions=True)})
    delete_index(table)


def _shards(dataset: DatasetDir, recipe: ImageRecipe) -> list[int]:
    return PACK.shards(dataset, recipe)


def _fingerprint(dataset: DatasetDir, recipe: ImageRecipe, shard: int) -> str:
    # Only set options: those added later must not make finished shards pending.
    config = {"resolution": recipe.encode.resolution, "batch_size": recipe.encode.batch_size}
    config |= recipe.encode.model_dump(mode="json", include=_DECIDE_BYTES, exclude_defaults=True)
    digests = [vae_digest_in(dataset, recipe.encode.vae), *_text_digests(recipe.encode)]
    return fingerprint("encode/1", config, [require_entry(dataset, "pack", shard)], digests)


def _text_digests(config: EncodeConfig) -> list[str]:
    """The digest of the text encoder, where it is used."""
    if config.text_embeddings == "none":
        return []
    from sdtrain.formats.frozen import text_encoder_digest  # late: it brings torch

    return [text_encoder_digest(config.text_encoder)]


def _run(dataset: DatasetDir, recipe: ImageRecipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    compute_vae_digest(recipe.encode.vae)  # from here on, fingerprints are of the loaded VAE, not of the cached digest
    for shard in shards:
        yield encode_shard(dataset, recipe.encode, shard)


def _info(dataset: DatasetDir, shard: int) -> list[Path]:
    return [dataset.latents_info]


def _drop(dataset: DatasetDir, recipe: ImageRecipe, shard: int, removed: Removed) -> None:
    drop_latents(removed.table, removed.uids, removed.origins)


def _networks(recipe: ImageRecipe) -> Openers:
    encode = recipe.encode
    openers: Openers = {"encode.vae": partial(check_vae, encode.vae)}
    if encode.text_embeddings != "none":
        openers["encode.text_encoder"] = partial(check_text_embedder, encode.text_encoder, encode.text_embeddings)
    return openers


ENCODE: Stage[ImageRecipe] = Stage(
    *("encode", _shards, _fingerprint, _run),
    # Separate, because latents/info.json holds the first shard's quality, whichever process encodes the others.
    is_on=always_on,
    inputs={"pack": "same shard", "encode": "first shard"},
    planned_by="decide",
    num_shards=expected_shards,
    beside=_info,
    table=Table(
        view="latents",
        comment="Encoded samples, and where their moments lie in the latents shards",
        columns={
            **dict.fromkeys(("uid", "key", "caption", "url"), "VARCHAR"),
            **dict.fromkeys(("offset", "num_bytes"), "BIGINT"),
            **dict.fromkeys(("height", "width"), "INTEGER"),
            "shard": "INTEGER",
            "tar": "VARCHAR",
        },
        path=DatasetDir.latents_table,
        rewriting=Rewriting(origins=_ORIGINS, has_tar=True, drop=_drop, recount=count_rows),
    ),
    drops=None,
    uses_gpu=True,
    needs=Needs(files=no_openers, networks=_networks, sized=no_openers),
    work=WORK["encode"],
)
