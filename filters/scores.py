"""SCORE: downloaded pictures -> scores, hashes and sizes; every picture is decoded once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from filters.heads import clip_digest, load_aesthetic, load_clip, load_safety, load_watermark
from filters.inputs import clip_pixels, perceptual_hash, pixel_sha256, thumbnail, watermark_pixels
from filters.recipe import Recipe, ScoreConfig
from filters.weights import digest_of
from sdtrain.data.dataset import DatasetDir
from sdtrain.data.files import publish
from sdtrain.data.manifest import ShardReport, describe_outputs, fingerprint, require_entry
from sdtrain.data.pictures import decode_rgb, picture_extension
from sdtrain.data.selection import selected_shards
from sdtrain.data.stage import Stage
from sdtrain.data.tars import read_samples

_DECODERS = 2
# Shards may be scored by several threads of a process: they decode side by side and take turns at the networks.
_ONE_AT_A_TIME = Lock()
_SCORES = ("aesthetic", "pwatermark", "punsafe", "similarity")
_TABLE = pa.schema(
    [
        *((name, pa.string()) for name in ("uid", "key", "pixel_sha256")),
        ("phash", pa.int64()),
        ("thumbnail", pa.binary()),
        ("image_width", pa.int32()),
        ("image_height", pa.int32()),
        *((name, pa.float32()) for name in _SCORES),
        ("reason", pa.string()),
    ]
)


@dataclass(frozen=True)
class Looked:
    """What one decode gives: a row of the table, and the networks' inputs (None for a damaged picture)."""

    row: dict[str, Any]
    caption: str
    clip: NDArray[np.float32] | None = None
    watermark: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Models:
    """The networks that a recipe asks for; None for those it skips."""

    device: torch.device
    clip: Any | None
    tokenizer: Any | None
    aesthetic: Any | None
    safety: Any | None
    watermark: Any | None

    @property
    def clip_px(self) -> int | None:
        """Side of CLIP's input."""
        return None if self.clip is None else int(self.clip.visual.image_size[0])


def look(key: str, members: dict[str, bytes], uid: str, models: Models) -> Looked:
    """Decodes one picture, once, and takes from it everything that later stages need."""
    caption = members.get("txt", b"").decode("utf-8", "replace")
    row: dict[str, Any] = dict.fromkeys(_TABLE.names) | {"uid": uid, "key": key}
    try:
        picture = decode_rgb(members[picture_extension(members)])
    except OSError:
        return Looked(row | {"reason": "undecodable"}, caption)
    row |= {
        "pixel_sha256": pixel_sha256(picture),
        "phash": perceptual_hash(picture),
        "thumbnail": thumbnail(picture),
        "image_width": picture.width,
        "image_height": picture.height,
    }
    clip = clip_pixels(picture, models.clip_px) if models.clip_px else None
    return Looked(row, caption, clip, watermark_pixels(picture) if models.watermark else None)


def score_batch(looked: Sequence[Looked], models: Models) -> list[dict[str, Any]]:
    """The rows of one batch with the networks' scores filled in, float32."""
    with _ONE_AT_A_TIME, torch.inference_mode():
        return _score_batch(looked, models)


def _score_batch(looked: Sequence[Looked], models: Models) -> list[dict[str, Any]]:
    rows = [dict(item.row) for item in looked]
    alive = [i for i, item in enumerate(looked) if item.row["reason"] is None]
    if not alive:
        return rows
    scores = _clip_scores([looked[i] for i in alive], models) if models.clip is not None else {}
    if models.watermark is not None:
        pixels = _stacked(looked[i].watermark for i in alive).to(models.device)
        scores["pwatermark"] = models.watermark(pixels)
    for name, values in scores.items():
        for i, value in zip(alive, values.float().cpu().tolist(), strict=True):
            # NaN is above every limit to SQL, so it would pass rules; NULL is counted as missing.
            rows[i][name] = value if math.isfinite(value) else None
    return rows


def _clip_scores(looked: Sequence[Looked], models: Models) -> dict[str, Tensor]:
    if models.clip is None or models.tokenizer is None:
        return {}
    pixels = _stacked(item.clip for item in looked).to(models.device)
    images = models.clip.encode_image(pixels, normalize=True).float()
    tokens = models.tokenizer([item.caption for item in looked]).to(models.device)
    texts = models.clip.encode_text(tokens, normalize=True).float()
    scores = {"similarity": (images * texts).sum(dim=-1)}
    if models.aesthetic is not None:
        scores["aesthetic"] = models.aesthetic(images)
    if models.safety is not None:
        scores["punsafe"] = models.safety(images)
    return scores


def _stacked(inputs: Iterable[NDArray[np.float32] | None]) -> Tensor:
    return torch.from_numpy(np.stack([values for values in inputs if values is not None]))


def score_shard(dataset: DatasetDir, config: ScoreConfig, shard: int) -> ShardReport:
    """Writes one row for every downloaded picture of the shard, damaged ones included."""
    models = load_models(config)
    uids = _uids(dataset, shard)
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(_DECODERS) as pool:
        for batch in _looked(dataset, shard, uids, config.batch_size, models, pool):
            rows += score_batch(batch, models)
    table = pa.Table.from_pylist(rows, _TABLE.with_metadata(_described(config)))
    with publish(dataset.scores(shard)) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    damaged = sum(row["reason"] is not None for row in rows)
    return ShardReport(
        stage="score",
        shard=shard,
        num_in=len(uids),
        num_out=len(rows) - damaged,
        dropped={"undecodable": damaged} if damaged else {},
        outputs=describe_outputs(dataset, [dataset.scores(shard)]),
    )


def _looked(
    dataset: DatasetDir, shard: int, uids: dict[str, str], size: int, models: Models, pool: ThreadPoolExecutor
) -> Iterator[list[Looked]]:
    """Batches of decoded pictures; the next one is decoded while the networks look at this one."""
    samples = iter(read_samples(dataset.images_tar(shard)))

    def begin() -> list[Any]:
        part = islice(samples, size)
        return [pool.submit(look, key, members, uids[key], models) for key, members in part]

    ahead = begin()
    while ahead:
        current, ahead = ahead, begin()
        yield [future.result() for future in current]


def load_models(config: ScoreConfig) -> Models:
    """The recipe's networks, once a process.

    Raises:
        UserError: weights that are missing or of another network.
    """
    with _ONE_AT_A_TIME:
        return _load_models(config)


@lru_cache(maxsize=1)
def _load_models(config: ScoreConfig) -> Models:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clip, tokenizer = load_clip(config.clip_model, config.clip_weights) if config.clip_weights else (None, None)
    heads = [
        load(name).to(device) if name else None
        for load, name in zip((load_aesthetic, load_safety, load_watermark), _head_weights(config), strict=True)
    ]
    return Models(device, clip.to(device) if clip is not None else None, tokenizer, *heads)


def _head_weights(config: ScoreConfig) -> tuple[str | None, str | None, str | None]:
    """Weights of the aesthetic, safety and watermark networks; the first two judge CLIP's embedding."""
    if config.clip_weights is None:
        return None, None, config.watermark_weights
    return config.aesthetic_weights, config.safety_weights, config.watermark_weights


def _uids(dataset: DatasetDir, shard: int) -> dict[str, str]:
    """The uids by key of the shard's downloaded pictures."""
    table = pq.read_table(dataset.images_table(shard), columns=["key", "uid", "reason"])
    return {row["key"]: row["uid"] for row in table.to_pylist() if row["reason"] is None}


def _described(config: ScoreConfig) -> dict[str, str]:
    """Which models gave the scores, for the file's own metadata."""
    settings = {f"sdtrain.{name}": str(value) for name, value in config.model_dump().items()}
    names = ("clip", "aesthetic", "safety", "watermark")
    return settings | {f"sdtrain.{n}_digest": d for n, d in zip(names, _digests(config), strict=True)}


@lru_cache(maxsize=1)
def _digests(config: ScoreConfig) -> tuple[str, ...]:
    """What identifies the weights of CLIP and of the three heads."""
    return (clip_digest(config.clip_model, config.clip_weights), *map(digest_of, _head_weights(config)))


def _shards(dataset: DatasetDir, recipe: Recipe) -> list[int]:
    return list(selected_shards(dataset))


def _fingerprint(dataset: DatasetDir, recipe: Recipe, shard: int) -> str:
    config = recipe.score.model_dump(mode="json")
    return fingerprint("score/1", config, [require_entry(dataset, "download", shard)], _digests(recipe.score))


def _run(dataset: DatasetDir, recipe: Recipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    for shard in shards:
        yield score_shard(dataset, recipe.score, shard)


SCORE: Stage[Recipe] = Stage("score", _shards, _fingerprint, _run)
