"""SCORE: downloaded pictures -> scores, hashes and sizes; every picture is decoded once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from threading import Lock
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from filters.heads import WatermarkClassifier, load_aesthetic, load_clip, load_safety, load_watermark
from filters.recipe import Recipe, ScoreConfig
from filters.weights import digest_of
from sdtrain.data.dataset import DatasetDir
from sdtrain.data.files import publish
from sdtrain.data.manifest import ShardReport, describe_outputs, fingerprint, require_entry
from sdtrain.data.pictures import decode_rgb, picture_extension
from sdtrain.data.stage import Stage
from sdtrain.data.tars import read_samples

THUMBNAIL_SIDE = 4
_DECODERS = 2
# Shards may be scored by several threads of a process: they decode side by side and take turns at the networks.
_ONE_AT_A_TIME = Lock()
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
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


def clip_pixels(picture: Image.Image, size_px: int) -> NDArray[np.float32]:
    """CLIP's preprocessing of an RGB picture: (3, size_px, size_px), normalised.

    Shorter side to `size_px` by Pillow's bicubic filter, long side rounded down, centre crop: openai/CLIP,
    clip/clip.py.
    """
    short = min(picture.size)
    width, height = (size_px if side == short else int(size_px * side / short) for side in picture.size)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size_px) / 2.0), round((height - size_px) / 2.0)
    cut = resized.crop((left, top, left + size_px, top + size_px))
    return _normalised(cut, CLIP_MEAN, CLIP_STD)


def watermark_pixels(picture: Image.Image) -> NDArray[np.float32]:
    """The watermark detector's input: (3, 256, 256), squashed to a square and normalised."""
    side = WatermarkClassifier.INPUT_PX
    squashed = picture.resize((side, side), Image.Resampling.BILINEAR)
    return _normalised(squashed, WatermarkClassifier.MEAN, WatermarkClassifier.STD)


def look(key: str, members: dict[str, bytes], uid: str, models: Models) -> Looked:
    """Decodes one picture, once, and takes from it everything that later stages need."""
    caption = members.get("txt", b"").decode("utf-8", "replace")
    row: dict[str, Any] = dict.fromkeys(_TABLE.names) | {"uid": uid, "key": key}
    try:
        picture = decode_rgb(members[picture_extension(members)])
    except OSError:
        return Looked(row | {"reason": "undecodable"}, caption)
    small = picture.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)
    row |= {
        "pixel_sha256": hashlib.sha256(b"%d %d " % picture.size + picture.tobytes()).hexdigest(),
        "phash": perceptual_hash(picture),
        "thumbnail": small.tobytes(),
        "image_width": picture.width,
        "image_height": picture.height,
    }
    clip = clip_pixels(picture, models.clip_px) if models.clip_px else None
    return Looked(row, caption, clip, watermark_pixels(picture) if models.watermark else None)


def perceptual_hash(picture: Image.Image) -> int:
    """The 64-bit DCT hash of a picture's brightness (imagehash.phash), as a signed integer."""
    bits = imagehash.phash(picture).hash.ravel()
    return int(np.packbits(bits).view(">i8")[0])


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
            rows[i][name] = value
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
    described = {f"sdtrain.{name}": str(value) for name, value in config.model_dump().items()}
    table = pa.Table.from_pylist(rows, _TABLE.with_metadata(described))
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
        for load, name in (
            (load_aesthetic, config.aesthetic_weights),
            (load_safety, config.safety_weights),
            (load_watermark, config.watermark_weights),
        )
    ]
    return Models(device, clip.to(device) if clip is not None else None, tokenizer, *heads)


def _uids(dataset: DatasetDir, shard: int) -> dict[str, str]:
    """The uids by key of the shard's downloaded pictures."""
    table = pq.read_table(dataset.images_table(shard), columns=["key", "uid", "reason"])
    return {row["key"]: row["uid"] for row in table.to_pylist() if row["reason"] is None}


def _normalised(picture: Image.Image, mean: Iterable[float], std: Iterable[float]) -> NDArray[np.float32]:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255)
    mean_, std_ = (torch.tensor(tuple(values)).view(3, 1, 1) for values in (mean, std))
    normalised: NDArray[np.float32] = pixels.sub(mean_).div(std_).numpy()
    return normalised


@lru_cache(maxsize=1)
def _digests(config: ScoreConfig) -> tuple[str, ...]:
    weights = (config.clip_weights, config.aesthetic_weights, config.watermark_weights, config.safety_weights)
    # open_clip checks what it downloads by a tag; a file is told apart by its digest.
    tags = weights[0] if weights[0] in ("openai", None) else digest_of(weights[0])
    return (str(tags), *(digest_of(name) for name in weights[1:]))


def _shards(dataset: DatasetDir, recipe: Recipe) -> list[int]:
    return list(range(len(require_entry(dataset, "select", 0).outputs)))


def _fingerprint(dataset: DatasetDir, recipe: Recipe, shard: int) -> str:
    config = recipe.score.model_dump(mode="json")
    return fingerprint("score/1", config, [require_entry(dataset, "download", shard)], _digests(recipe.score))


def _run(dataset: DatasetDir, recipe: Recipe, shards: Sequence[int]) -> Iterator[ShardReport]:
    for shard in shards:
        yield score_shard(dataset, recipe.score, shard)


SCORE: Stage[Recipe] = Stage("score", _shards, _fingerprint, _run)
