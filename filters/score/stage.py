"""SCORE: downloaded images -> scores, hashes, sizes and quality; every image is decoded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from filters.columns import QUALITY_COLUMNS, SCORE_COLUMNS, UNDECODABLE
from filters.recipe import NETWORKS, Recipe, ScoreConfig
from filters.rules import RuleValue, in_words
from filters.score.weights import digest_of
from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.manifest import describe_outputs, num_selected_shards, require_entry, selected_shards
from sdtrain.dataset.rewriting import IN_TABLE
from sdtrain.dataset.shard_report import ShardReport, fingerprint
from sdtrain.dataset.stage import Drops, Needs, Openers, Stage, Table, always_on, no_openers, nothing_beside
from sdtrain.dataset.work import WORK
from sdtrain.errors import UserError
from sdtrain.images.miniature import MINIATURE_BYTES
from sdtrain.images.miniature import VERSION as MINIATURE_VERSION
from sdtrain.models.weights import clip_digest

_TABLE = pa.schema(
    [
        *((name, pa.string()) for name in ("uid", "key", "pixel_sha256")),
        ("phash", pa.int64()),
        ("thumbnail", pa.binary()),
        ("image_width", pa.int32()),
        ("image_height", pa.int32()),
        *((name, pa.float32()) for name in (*SCORE_COLUMNS, *QUALITY_COLUMNS)),
        ("reason", pa.string()),
    ]
)
_ALONE = ("watermark", "sscd")  # they see the image, and heads see CLIP's embedding of it


def score_shards(dataset: DatasetDir, config: ScoreConfig, shards: Sequence[int]) -> Iterator[ShardReport]:
    """Writes one row per downloaded image, damaged ones included; raises `UserError` for bad weights or shards."""
    # Lazy, so that checking whether a shard is finished does not wait for torch, open_clip and timm.
    from filters.score.jpeg_decoder import require_decoder
    from filters.score.models import load_models
    from filters.score.pipeline import score_rows

    weight_digests(config)  # first, to fail on weights other than the recipe pins before loading them
    models = load_models(config)
    on_gpu = require_decoder(models.device, config.decode)
    sscd_width = models.sscd.width if models.sscd else None
    schema = _schema(config, sscd_width).with_metadata(_described(config, models.device.type, on_gpu))
    for shard, rows in score_rows(dataset, shards, models, config.batch_size, on_gpu):
        yield _write(dataset, shard, rows, schema)


def _write(dataset: DatasetDir, shard: int, rows: list[dict[str, Any]], schema: pa.Schema) -> ShardReport:
    with publish(dataset.scores(shard)) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary, compression="zstd")
    damaged = sum(row["reason"] is not None for row in rows)
    return ShardReport(
        stage="score",
        shard=shard,
        num_in=len(rows),
        num_out=len(rows) - damaged,
        dropped={UNDECODABLE: damaged} if damaged else {},
        outputs=describe_outputs(dataset, [dataset.scores(shard)]),
    )


def _schema(config: ScoreConfig, sscd_width: int | None = None) -> pa.Schema:
    """Returns the table's columns; miniatures and embeddings, many times the size of the others, only if requested."""
    table = _TABLE
    if config.store_miniatures:
        table = table.append(pa.field("miniature", pa.binary(MINIATURE_BYTES)))
    if sscd_width is not None:
        table = table.append(pa.field("sscd_embedding", pa.list_(pa.float16(), sscd_width)))
    if not config.store_embeddings or config.clip_weights is None:
        return table
    from sdtrain.models.clip import embedding_size

    return table.append(pa.field("embedding", pa.list_(pa.float16(), embedding_size(config.clip_model))))


def _described(config: ScoreConfig, device: str, on_gpu: bool) -> dict[str, str]:
    """Returns the models and settings behind the scores, for the file's metadata."""
    settings = config.described() | {"decode": "gpu" if on_gpu else "cpu", "device": device}
    settings |= {"miniature": MINIATURE_VERSION} if config.store_miniatures else {}
    digests = {f"{name}_digest": digest for name, digest in weight_digests(config)}
    return {f"sdtrain.{name}": str(value) for name, value in (settings | digests).items()}


@lru_cache(maxsize=1)
def weight_digests(config: ScoreConfig) -> tuple[tuple[str, str], ...]:
    """Returns (network, digest) for all `NETWORKS`; "none" for those without weights, and for heads without CLIP.

    SSCD, which came later, counts only where it is used. UserError if weights are unavailable, or not those that the
    recipe pins.
    """
    used = [name for name in NETWORKS if name != "sscd" or config.sscd_weights is not None]
    return tuple((name, weight_digest(config, name)) for name in used)


@lru_cache
def weight_digest(config: ScoreConfig, name: str) -> str:
    """Returns the digest of one of `NETWORKS`; "none" if unused. Raises `UserError` as `weight_digests` does."""
    weights = getattr(config, f"{name}_weights")
    if name == "clip":
        digest = clip_digest(config.clip_model, weights)
    else:
        digest = digest_of(weights if name in _ALONE or config.clip_weights is not None else None)
    pinned = config.pins.get(name)
    if pinned and digest not in (pinned, "none"):
        raise UserError(
            f"score.{name}_sha256 is {pinned}, and that of {name}_weights is {digest}. Put the right file there, or "
            "leave the pin out. (For a name of open_clip's the digest of its file is not known.)"
        )
    return digest


def _shards(dataset: DatasetDir, recipe: Recipe) -> list[int]:
    return list(selected_shards(dataset))


def _fingerprint(dataset: DatasetDir, recipe: Recipe, shard: int) -> str:
    config = recipe.score.described()
    config |= {"miniature": MINIATURE_VERSION} if recipe.score.store_miniatures else {}
    weights = [digest for _, digest in weight_digests(recipe.score)]
    return fingerprint("score/2", config, [require_entry(dataset, "download", shard)], weights)


def _run(dataset: DatasetDir, recipe: Recipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    yield from score_shards(dataset, recipe.score, shards)


def _rules(recipe: Recipe) -> dict[str, RuleValue]:
    return {}


def _networks(recipe: Recipe) -> Openers:
    config = recipe.score
    named = [name for name in NETWORKS if getattr(config, f"{name}_weights") is not None]
    openers = Openers({f"score.{name}_weights": partial(_check_network, config, name) for name in named})
    return openers | ({"score.clip_model": partial(_check_heads, config)} if "clip" in named else {})


def _check_network(config: ScoreConfig, name: str) -> str:
    from filters.score.models import load_network

    digest = weight_digest(config, name)
    load_network(config, name)
    return f"{getattr(config, f'{name}_weights')}: {digest[:12]}"


def _check_heads(config: ScoreConfig) -> str:
    from filters.score.models import check_heads

    check_heads(config)
    return config.clip_model


SCORE: Stage[Recipe] = Stage(
    *("score", _shards, _fingerprint, _run),
    is_on=always_on,
    inputs={"download": "same shard"},
    planned_by=None,
    num_shards=num_selected_shards,
    beside=nothing_beside,
    table=Table(
        view="scores",
        comment="One row for every downloaded image: our scores, measures of quality and hashes",
        columns={
            **dict.fromkeys(("uid", "key", "pixel_sha256"), "VARCHAR"),
            "phash": "BIGINT",
            "thumbnail": "BLOB",
            **dict.fromkeys(("image_width", "image_height"), "INTEGER"),
            **dict.fromkeys((*SCORE_COLUMNS, *QUALITY_COLUMNS), "FLOAT"),
            "reason": "VARCHAR",
            "shard": "INTEGER",
        },
        path=DatasetDir.scores,
        rewriting=IN_TABLE,
    ),
    drops=Drops(
        repeats=False, rules=_rules, last={UNDECODABLE: "the stored image cannot be decoded"}, explain=in_words
    ),
    uses_gpu=True,
    needs=Needs(files=no_openers, networks=_networks, sized=no_openers),
    work=WORK["score"],
)
