"""A recipe's networks, and the scores that they give a batch of images."""

from __future__ import annotations

import logging
import math
import multiprocessing
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from filters.recipe import ScoreConfig
from filters.score.heads import EMBEDDING_SIZE, load_aesthetic, load_aesthetic_v1, load_safety, load_watermark
from filters.score.preprocess import WATERMARK_MEAN, WATERMARK_STD, PreprocessedImage, RequiredViews
from filters.score.sscd import MEAN, STD, Sscd, load_sscd
from filters.score.weights import PUBLISHED
from sdtrain.errors import UserError
from sdtrain.models.clip import Preprocess, clip_preprocess, embedding_size, load_clip, normalised
from sdtrain.models.device import claim_device
from sdtrain.models.weights import RANDOM, RANDOM_FULL
from sdtrain.precision import torch_dtype

# The published heads were trained on embeddings of this model by OpenAI only.
_HEADS_MODEL = "ViT-L-14-quickgelu"
# Threads of a process may score shards concurrently: they decode in parallel and take turns at the networks.
_ONE_AT_A_TIME = Lock()
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """The networks that a recipe uses; None for those it skips.

    `dtype` is of the large networks (autocast); the small `heads` on CLIP's embeddings are float32.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    clip: Any | None = None
    tokenizer: Any | None = None
    preprocess: Preprocess | None = None
    heads: tuple[tuple[str, Any], ...] = ()
    watermark: Any | None = None
    store_embeddings: bool = False
    store_miniatures: bool = False
    sscd: Sscd | None = None

    @property
    def required_views(self) -> RequiredViews:
        """The views of an image that the networks and the score table need."""
        has_sscd = self.sscd is not None
        return RequiredViews(self.preprocess, self.watermark is not None, self.store_miniatures, has_sscd)


@dataclass(frozen=True)
class ScoredBatch:
    """A batch whose scores, by name one per undamaged image, are in transit from the device.

    `embeddings`, by column and float16, are the undamaged images', if the recipe stores them. `arrived` signals that
    the scores can be read; None if they already can.
    """

    batch: Sequence[PreprocessedImage]
    scores: dict[str, Tensor]
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    arrived: torch.cuda.Event | None = None

    def rows(self) -> list[dict[str, Any]]:
        """Returns the batch's rows, with scores."""
        if self.arrived is not None:
            self.arrived.synchronize()
        rows = [dict(item.row) for item in self.batch]
        alive = [row for row in rows if row["reason"] is None]
        for name, values in self.scores.items():
            for row, value in zip(alive, values.tolist(), strict=True):
                # SQL orders NaN above every limit, so it would pass rules; NULL counts as missing.
                row[name] = value if math.isfinite(value) else None
        for name, embeddings in self.embeddings.items():
            for row, embedding in zip(alive, embeddings, strict=True):
                row[name] = embedding.numpy() if embedding.isfinite().all() else None
        return rows


def score_batch(batch: Sequence[PreprocessedImage], models: Models) -> ScoredBatch:
    """Starts the networks on a batch; a GPU runs the next one while this one's rows are built."""
    whole = [item for item in batch if not item.is_damaged]
    if not whole:
        return ScoredBatch(batch, {})
    cuda = models.device.type == "cuda"
    with _ONE_AT_A_TIME, torch.inference_mode():
        with _autocast(models):
            images = _image_embeddings(whole, models)
            texts = _text_embeddings(whole, models)
            scores = _watermark_scores(whole, models)
            embeddings = _sscd_embeddings(whole, models)
        if images is not None and texts is not None:
            scores["similarity"] = (images * texts).sum(dim=-1)
            scores |= {name: head(images) for name, head in models.heads}
        # Not waited for: a non-blocking copy from a GPU goes to pinned memory.
        here = {name: values.float().to("cpu", non_blocking=cuda) for name, values in scores.items()}
        if models.store_embeddings and images is not None:
            embeddings["embedding"] = images
        kept = {name: values.half().to("cpu", non_blocking=cuda) for name, values in embeddings.items()}
        arrived = torch.cuda.current_stream().record_event() if cuda else None
    return ScoredBatch(batch, here, kept, arrived)


def _autocast(models: Models) -> AbstractContextManager[Any]:
    if models.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(models.device.type, models.dtype)


def _image_embeddings(images: Sequence[PreprocessedImage], models: Models) -> Tensor | None:
    if models.clip is None or models.preprocess is None:
        return None
    pixels = _on_device([item.clip for item in images], models.device)
    inputs = normalised(pixels, models.preprocess.mean, models.preprocess.std)
    return torch.nn.functional.normalize(models.clip.encode_image(inputs).float(), dim=-1)


def _text_embeddings(images: Sequence[PreprocessedImage], models: Models) -> Tensor | None:
    if models.clip is None or models.tokenizer is None:
        return None
    tokens = _sent(models.tokenizer([item.caption for item in images]), models.device)
    return torch.nn.functional.normalize(models.clip.encode_text(tokens).float(), dim=-1)


def _watermark_scores(images: Sequence[PreprocessedImage], models: Models) -> dict[str, Tensor]:
    if models.watermark is None:
        return {}
    pixels = _on_device([item.watermark for item in images], models.device)
    return {"pwatermark": models.watermark(normalised(pixels, WATERMARK_MEAN, WATERMARK_STD))}


def _sscd_embeddings(images: Sequence[PreprocessedImage], models: Models) -> dict[str, Tensor]:
    if models.sscd is None:
        return {}
    pixels = _on_device([item.sscd for item in images], models.device)
    return {"sscd_embedding": models.sscd(normalised(pixels, MEAN, STD))}


def _on_device(views: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Stacks the views to (B, H, W, 3) uint8: a quarter of the bytes of float32 to transfer."""
    present = [view for view in views if view is not None]
    if any(view.device != present[0].device for view in present):
        present = [view.to(device, non_blocking=True) for view in present]
    return _sent(torch.stack(present), device)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    if values.device.type == device.type:
        return values
    return values.pin_memory().to(device, non_blocking=True)


def load_models(config: ScoreConfig) -> Models:
    """Loads the recipe's networks once per process, on its GPU; raises `UserError` for missing or wrong weights."""
    with _ONE_AT_A_TIME:
        return _load_models(config)


def load_network(config: ScoreConfig, name: str) -> Any:
    """Loads one of a recipe's `NETWORKS` on the CPU; raises `UserError` if weights are missing or another network's."""
    if name == "clip":
        return load_clip(config.clip_model, str(config.clip_weights))[0]
    load = {"watermark": load_watermark, "aesthetic": load_aesthetic, "aesthetic_v1": load_aesthetic_v1}
    return (load | {"safety": load_safety, "sscd": load_sscd})[name](getattr(config, f"{name}_weights"))


@lru_cache(maxsize=1)
def _load_models(config: ScoreConfig) -> Models:
    check_heads(config)
    device = claim_device()
    _warn_of_idle_gpus()
    if config.decode == "gpu" and device.type != "cuda":
        raise UserError("score.decode: gpu needs an NVIDIA GPU, and none is seen here. Set it to auto or cpu.")
    watermark = load_watermark(config.watermark_weights).to(device) if config.watermark_weights else None
    sscd = load_sscd(config.sscd_weights).to(device) if config.sscd_weights else None
    models = Models(
        *(device, torch_dtype(config.dtype)),
        watermark=watermark,
        store_embeddings=config.store_embeddings,
        store_miniatures=config.store_miniatures,
        sscd=sscd,
    )
    if config.clip_weights is None:
        return models
    clip, tokenizer = load_clip(config.clip_model, config.clip_weights)
    preprocess = clip_preprocess(clip, config.clip_model, config.clip_weights)
    heads = tuple((name, load(weights).to(device)) for name, load, weights in _heads(config) if weights)
    return replace(models, clip=clip.to(device), tokenizer=tokenizer, preprocess=preprocess, heads=heads)


def _heads(config: ScoreConfig) -> tuple[tuple[str, Any, str | None], ...]:
    return (
        ("aesthetic", load_aesthetic, config.aesthetic_weights),
        ("aesthetic_v1", load_aesthetic_v1, config.aesthetic_v1_weights),
        ("punsafe", load_safety, config.safety_weights),
    )


def check_heads(config: ScoreConfig) -> None:
    """Raises `UserError` for heads on another model's embeddings, where their scores would mean nothing."""
    named = [weights for _, _, weights in _heads(config) if weights]
    if not named or config.clip_weights is None:
        return
    skip = "Set aesthetic_weights, aesthetic_v1_weights and safety_weights to null, or clip_model to " + _HEADS_MODEL
    size = embedding_size(config.clip_model)
    if size != EMBEDDING_SIZE:
        raise UserError(
            f"score.clip_model: the heads judge embeddings of {EMBEDDING_SIZE} numbers, and those of "
            f"{config.clip_model} have {size}. {skip}."
        )
    trial = config.clip_weights.startswith((RANDOM, RANDOM_FULL))
    published = [weights for weights in named if weights in PUBLISHED]
    if published and config.clip_model != _HEADS_MODEL and not trial:
        raise UserError(
            f"score.clip_model: {published[0]} judges embeddings of OpenAI's {_HEADS_MODEL}; on those of "
            f"{config.clip_model} its scores would mean nothing. {skip}."
        )


def _warn_of_idle_gpus() -> None:
    num_gpus = torch.cuda.device_count()
    if num_gpus > 1 and multiprocessing.parent_process() is None:
        _log.warning(
            "%d GPUs are here and one process uses one. Run the flow with engine=processes and workers=%d to use all.",
            *(num_gpus, num_gpus),
        )
