"""CLIP's similarity between images and their captions, by the CLIP that SCORE used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from filters.caption.table import Caption
from filters.recipe import ScoreConfig
from sdtrain.dataset.files import read_parquet
from sdtrain.dataset.layout import DatasetDir
from sdtrain.endpoint.images import in_threads, shard_images
from sdtrain.images.decode import decode_rgb
from sdtrain.models.clip import Preprocess, clip_preprocess, clip_view, load_clip, normalised, pixels_of
from sdtrain.models.device import claim_device
from sdtrain.pack.captions import ALT
from sdtrain.precision import torch_dtype

_ONE_AT_A_TIME = Lock()


def with_similarity(
    dataset: DatasetDir, config: ScoreConfig, shard: int, captions: Sequence[Caption], keys: Mapping[str, str]
) -> list[Caption]:
    """Fills in the similarity of each caption, by a recipe with CLIP; `keys` by uid.

    An image's own alt text was compared by SCORE. For others its embedding is needed: stored, or made again.
    """
    scored = _column(dataset, shard, "similarity")
    measured = [
        replace(caption, similarity=scored[caption.uid]) if _is_own(caption) else caption for caption in captions
    ]
    others = [number for number, caption in enumerate(captions) if not _is_own(caption)]
    if not others:
        return measured
    network = _load(config)
    embeddings = _embeddings(dataset, config, shard, {captions[n].uid: keys[captions[n].uid] for n in others}, network)
    for start in range(0, len(others), config.batch_size):
        numbers = [n for n in others[start : start + config.batch_size] if captions[n].uid in embeddings]
        texts = network.texts([captions[n].text for n in numbers])
        images = torch.stack([embeddings[captions[n].uid] for n in numbers])
        for number, value in zip(numbers, (images * texts).sum(dim=-1).tolist(), strict=True):
            measured[number] = replace(captions[number], similarity=value if np.isfinite(value) else None)
    return measured


def _is_own(caption: Caption) -> bool:
    return caption.source == ALT and caption.origin_uid == caption.uid


@dataclass(frozen=True)
class _Clip:
    network: Any
    tokenizer: Any
    preprocess: Preprocess
    device: torch.device
    dtype: torch.dtype

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings, (B, D) float32 on the CPU."""
        return self._unit(lambda: self.network.encode_text(self.tokenizer(list(texts)).to(self.device)))

    def images(self, pixels: Tensor) -> Tensor:
        """Unit embeddings of (B, H, W, 3) uint8 views, (B, D) float32 on the CPU."""
        inputs = normalised(pixels.to(self.device), self.preprocess.mean, self.preprocess.std)
        return self._unit(lambda: self.network.encode_image(inputs))

    def _unit(self, encode: Any) -> Tensor:
        autocast = nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)
        with _ONE_AT_A_TIME, torch.inference_mode(), autocast:
            return torch.nn.functional.normalize(encode().float(), dim=-1).cpu()


@lru_cache(maxsize=1)
def _load(config: ScoreConfig) -> _Clip:
    weights = str(config.clip_weights)
    network, tokenizer = load_clip(config.clip_model, weights)
    device = claim_device()
    preprocess = clip_preprocess(network, config.clip_model, weights)
    return _Clip(network.to(device), tokenizer, preprocess, device, torch_dtype(config.dtype))


def _embeddings(
    dataset: DatasetDir, config: ScoreConfig, shard: int, keys: Mapping[str, str], network: _Clip
) -> dict[str, Tensor]:
    """Of the images `keys`, by uid."""
    if config.store_embeddings:
        stored = _column(dataset, shard, "embedding")
        found = {uid: torch.tensor(stored[uid], dtype=torch.float32) for uid in keys if stored[uid] is not None}
        return {uid: torch.nn.functional.normalize(value, dim=-1) for uid, value in found.items()}
    uids = {key: uid for uid, key in keys.items()}
    made: dict[str, Tensor] = {}
    for batch in _views(dataset, shard, uids, network.preprocess, config.batch_size):
        made |= zip(batch, network.images(torch.stack(list(batch.values()))), strict=True)
    return {uids[key]: value for key, value in made.items()}


def _views(
    dataset: DatasetDir, shard: int, uids: Mapping[str, str], preprocess: Preprocess, size: int
) -> Iterator[dict[str, Tensor]]:
    def view(image: tuple[str, bytes]) -> tuple[str, Tensor]:
        return image[0], pixels_of(clip_view(decode_rgb(image[1]), preprocess))

    batch: dict[str, Tensor] = {}
    for key, pixels in in_threads(view, shard_images(dataset, shard, uids)):
        batch[key] = pixels
        if len(batch) == size:
            yield batch
            batch = {}
    if batch:
        yield batch


def _column(dataset: DatasetDir, shard: int, name: str) -> dict[str, Any]:
    rows = read_parquet(dataset.scores(shard), ["uid", name])
    return dict(zip(rows["uid"].to_pylist(), rows[name].to_pylist(), strict=True))
