"""The networks that look at images: features for FID and KID, CLIP's embeddings, the demo's checker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdtrain.dataset.files import sha256_of
from sdtrain.demo.checker import judge
from sdtrain.demo.images import COLORS, SHAPES
from sdtrain.errors import UserError
from sdtrain.evaluation.inception import NUM_FEATURES as INCEPTION_FEATURES
from sdtrain.evaluation.inception import find_inception, inception_view, load_inception
from sdtrain.evaluation.protocol import Protocol
from sdtrain.formats.frozen import load_vae, vae_digest
from sdtrain.models.clip import Preprocess, clip_preprocess, clip_view, load_clip, normalised, pixels_of
from sdtrain.models.device import claim_device, cores_of_process
from sdtrain.models.weights import clip_digest

NUM_FEATURES = {"inception": INCEPTION_FEATURES, "demo": 96}
"""Features of an image, by network."""
BATCH_SIZE = 32
"""Images or prompts that a network looks at together."""


@dataclass(frozen=True)
class FeatureNetwork:
    """What turns images into features.

    Attributes:
        view: an RGB image as the network wants it.
        network: (B, …) views -> (B, d) features.
    """

    view: Callable[[Image.Image], Tensor]
    network: Callable[[Tensor], Tensor]


def features_digest(protocol: Protocol) -> str:
    """What identifies the features: the weights' sha256, or the seed of random ones.

    Raises:
        UserError: no such weights.
    """
    return _features_digest(protocol.network, protocol.network_weights)


@lru_cache  # each part asks
def _features_digest(network: str, weights: str) -> str:
    if network == "demo":
        return vae_digest("demo")
    path = find_inception(weights)
    return sha256_of(path) if path else weights


def features_of(images: Sequence[Image.Image], protocol: Protocol) -> Tensor:
    """(n, d) float32 features; `NUM_FEATURES` says how many.

    Raises:
        UserError: no such weights, or features that are not finite.
    """
    found = _feature_network(protocol)
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        parts = [found.network(views.to(claim_device())).float().cpu() for views in _views(images, found.view)]
    return _finite(torch.cat(parts), f"The features of network '{protocol.network}'")


def check_networks(protocol: Protocol) -> str:
    """Loads what will look at the images, to see that it is there; it goes to no GPU and is not kept.

    Raises:
        UserError: a network that cannot be loaded.
    """
    load_vae("demo") if protocol.network == "demo" else load_inception(protocol.network_weights)
    if protocol.agreement == "clip":
        load_clip(protocol.clip_model, protocol.clip_weights)
    return f"{protocol.network}, {protocol.agreement}"


def _feature_network(protocol: Protocol) -> FeatureNetwork:
    return _load_features(protocol.network, protocol.network_weights, protocol.resize)


@lru_cache(maxsize=1)
def _load_features(name: str, weights: str, resize: Any) -> FeatureNetwork:
    if name == "demo":
        encoder = load_vae("demo").encoder.to(claim_device())
        return FeatureNetwork(_demo_view, lambda views: _demo_features(encoder, views))
    return FeatureNetwork(lambda image: inception_view(image, resize), load_inception(weights).to(claim_device()))


def _demo_view(image: Image.Image) -> Tensor:
    small = image.resize((64, 64), Image.Resampling.BICUBIC)
    return pixels_of(small).permute(2, 0, 1).float() / 127.5 - 1


def _demo_features(encoder: Any, views: Tensor) -> Tensor:
    """(B, 96): the means over all places of what the autoencoder's encoder has before its last convolution."""
    hidden: Tensor = encoder.conv_in(views)
    for block in encoder.down_blocks:
        hidden = block(hidden)
    hidden = torch.nn.functional.silu(encoder.conv_norm_out(encoder.mid_block(hidden)))
    return hidden.mean(dim=(2, 3))


@dataclass(frozen=True)
class _Clip:
    network: Any
    tokenizer: Any
    preprocess: Preprocess


@lru_cache(maxsize=1)
def _load_clip(model: str, weights: str) -> _Clip:
    network, tokenizer = load_clip(model, weights)
    return _Clip(network.to(claim_device()), tokenizer, clip_preprocess(network, model, weights))


def agreement_digest(protocol: Protocol) -> str:
    """What identifies that which compares images with prompts.

    Raises:
        UserError: no such weights.
    """
    if protocol.agreement != "clip":
        return protocol.agreement
    return _clip_digest(protocol.clip_model, protocol.clip_weights)


@lru_cache
def _clip_digest(model: str, weights: str) -> str:
    return f"{model} {clip_digest(model, weights)}"


def embed_images(images: Sequence[Image.Image], protocol: Protocol) -> Tensor:
    """(n, e) float32 embeddings of length 1.

    Raises:
        UserError: CLIP cannot be loaded, or its embeddings are not finite.
    """
    clip, device = _load_clip(protocol.clip_model, protocol.clip_weights), claim_device()
    parts = []
    with torch.inference_mode():
        for pixels in _views(images, lambda image: pixels_of(clip_view(image, clip.preprocess))):
            inputs = normalised(pixels.to(device), clip.preprocess.mean, clip.preprocess.std)
            parts.append(_unit(clip.network.encode_image(inputs)))
    return _finite(torch.cat(parts), "CLIP's embeddings of images")


def embed_texts(texts: Sequence[str], protocol: Protocol) -> tuple[Tensor, Tensor]:
    """(n, e) float32 embeddings of length 1, and which texts were cut, (n,) bool.

    A text that has more tokens than the model reads (77) is cut as open_clip's tokenizer does: the end token takes the
    last place.

    Raises:
        UserError: CLIP cannot be loaded, or its embeddings are not finite.
    """
    clip, device = _load_clip(protocol.clip_model, protocol.clip_weights), claim_device()
    tokens = clip.tokenizer(list(texts))
    one_more = clip.tokenizer(list(texts), context_length=tokens.shape[1] + 1)[:, :-1]
    with torch.inference_mode():
        parts = [_unit(clip.network.encode_text(part.to(device))) for part in tokens.split(BATCH_SIZE)]
    return _finite(torch.cat(parts), "CLIP's embeddings of prompts"), (tokens != one_more).any(dim=1)


def shown_by(images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
    """(n,) float32: how much of the colour and shape that a prompt names its image shows, 0, 0.5 or 1.

    Raises:
        UserError: a prompt names no colour or no shape of the demo's.
    """
    scores = []
    for image, text in zip(images, texts, strict=True):
        words = text.replace(",", " ").split()
        wanted = next((w for w in words if w in COLORS), None), next((w for w in words if w in SHAPES), None)
        if None in wanted:
            raise UserError(f"The demo's checker needs a colour and a shape in each prompt; '{text}' lacks one.")
        verdict = judge(image)
        scores.append(np.mean([verdict.color == wanted[0], verdict.shape == wanted[1]]))
    return torch.tensor(scores, dtype=torch.float32)


def _views(images: Sequence[Image.Image], view: Callable[[Image.Image], Tensor]) -> Iterator[Tensor]:
    """Batches of what a network sees; Pillow and torch resize on several cores at once."""
    with ThreadPoolExecutor(cores_of_process()) as pool:
        for first in range(0, len(images), BATCH_SIZE):
            yield torch.stack(list(pool.map(view, images[first : first + BATCH_SIZE])))


def _unit(embeddings: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu()


def _finite(values: Tensor, what: str) -> Tensor:
    if not values.isfinite().all():
        raise UserError(f"{what} are not finite: the weights are damaged, or the images are no images.")
    return values.clone()  # out of inference mode
