"""The networks of the metrics: features for FID and the like, CLIP's embeddings of images and prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sdtrain.dataset.files import sha256_of
from sdtrain.errors import UserError
from sdtrain.evaluation.features.dinov2 import dinov2_view, find_dinov2, load_dinov2
from sdtrain.evaluation.features.inception import find_inception, inception_view, load_inception
from sdtrain.evaluation.protocol import Protocol
from sdtrain.models.clip import Preprocess, clip_preprocess, clip_view, load_clip, normalised, pixels_of
from sdtrain.models.device import claim_device, cores_of_process
from sdtrain.models.weights import clip_digest
from sdtrain.options import Resize

BATCH_SIZE = 32


class FeatureNetwork(ABC):
    """A network whose features FID, KID and the like compare.

    Its `suffix` (`label` in prose) ends the names of its metrics, so that numbers of two networks are never confused.
    `frechet` is how its Fréchet distance is called, as a column and in prose.
    """

    num_features: int
    description: str
    suffix: str = ""
    label: str = ""
    frechet: tuple[str, str] = ("fid", "FID")

    def weights(self, protocol: Protocol) -> str:
        """The setting that names its weights, if there is a choice."""
        return ""

    @abstractmethod
    def digest(self, weights: str) -> str:
        """Identifies the weights; UserError if there are none of that name."""

    @abstractmethod
    def load(self, weights: str) -> nn.Module:
        """The network, (B, …) views -> (B, num_features), in eval mode on the CPU; UserError: no such weights."""

    @abstractmethod
    def view(self, image: Image.Image, resize: Resize) -> Tensor:
        """Preprocesses an RGB image."""

    def view_key(self, resize: Resize) -> str:
        """The setting that views depend on, if any."""
        return ""


class Inception(FeatureNetwork):
    """The network of FID, TensorFlow's Inception of 2015."""

    num_features = 2048
    description = "Inception's 2048 pooled features"

    def weights(self, protocol: Protocol) -> str:
        """A file, `inception-fid` or `random:SEED`."""
        return protocol.network_weights

    def digest(self, weights: str) -> str:
        """The file's sha256, or the seed of random weights."""
        path = find_inception(weights)
        return sha256_of(path) if path else weights

    def load(self, weights: str) -> nn.Module:
        """The network in eval mode."""
        return load_inception(weights)

    def view(self, image: Image.Image, resize: Resize) -> Tensor:
        """(3, 299, 299), from -1 to 1."""
        return inception_view(image, resize)

    def view_key(self, resize: Resize) -> str:
        """The resize to 299 pixels."""
        return resize


class Dinov2(FeatureNetwork):
    """The network of FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675), which was trained without labels."""

    num_features = 1024
    description = "DINOv2 ViT-L/14's 1024 features"
    suffix, label = "_dinov2", " (DINOv2)"
    frechet = ("fd", "FD")

    def weights(self, protocol: Protocol) -> str:
        """A file, `dinov2-vitl14` or `random:SEED`."""
        return protocol.dinov2_weights

    def digest(self, weights: str) -> str:
        """The file's sha256, or the seed of random weights."""
        path = find_dinov2(weights)
        return sha256_of(path) if path else weights

    def load(self, weights: str) -> nn.Module:
        """The network in eval mode."""
        return load_dinov2(weights)

    def view(self, image: Image.Image, resize: Resize) -> Tensor:
        """(3, 224, 224), normalised; the choice of resize is Inception's."""
        return dinov2_view(image)


_PUBLISHED: Mapping[str, type[FeatureNetwork]] = {"inception": Inception, "dinov2": Dinov2}


def stand_in(name: str) -> Any:
    """Imports a stand-in's module (see `protocol.STAND_INS`).

    It defines FEATURES, a FeatureNetwork; AGREEMENT, a Metric of the array `shown`; and `score_images`, which computes
    that array from images and prompts.
    """
    return import_module(f"sdtrain.{name}.evaluation")


def feature_network(name: str) -> FeatureNetwork:
    """The network of that name in `protocol.NETWORKS`."""
    if name in _PUBLISHED:
        return _PUBLISHED[name]()
    found: FeatureNetwork = stand_in(name).FEATURES
    return found


def features_digest(protocol: Protocol, network: str) -> str:
    """Identifies a network's weights; UserError if there are none."""
    return _features_digest(network, feature_network(network).weights(protocol))


@lru_cache  # each part asks
def _features_digest(network: str, weights: str) -> str:
    return feature_network(network).digest(weights)


def feature_config(protocol: Protocol, network: str) -> list[str]:
    """Everything that a network's features of an image depend on."""
    return [features_digest(protocol, network), feature_network(network).view_key(protocol.resize)]


def features_of(images: Sequence[Image.Image], protocol: Protocol, network: str) -> Tensor:
    """(n, num_features) float32; UserError if there are no such weights, or features are not finite."""
    source = feature_network(network)
    module = _load_features(network, source.weights(protocol))
    views = _views(images, lambda image: source.view(image, protocol.resize))
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        parts = [module(batch.to(claim_device())).float().cpu() for batch in views]
    return _finite(torch.cat(parts), f"The features of network '{network}'")


@lru_cache(maxsize=1)
def _load_features(name: str, weights: str) -> nn.Module:
    return feature_network(name).load(weights).to(claim_device())


def check_networks(protocol: Protocol) -> str:
    """Loads each network once on the CPU, as a check; UserError if one cannot be loaded."""
    for network in map(feature_network, protocol.networks):
        network.load(network.weights(protocol))
    if protocol.agreement == "clip":
        load_clip(protocol.clip_model, protocol.clip_weights)
    return ", ".join([*protocol.networks, protocol.agreement])


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
    """Identifies the weights that compare images with prompts; UserError if there are none."""
    if protocol.agreement != "clip":
        return protocol.agreement
    return _clip_digest(protocol.clip_model, protocol.clip_weights)


@lru_cache
def _clip_digest(model: str, weights: str) -> str:
    return f"{model} {clip_digest(model, weights)}"


def embed_images(images: Sequence[Image.Image], protocol: Protocol) -> Tensor:
    """(n, e) float32 embeddings of length 1; UserError if CLIP cannot be loaded, or its numbers are not finite."""
    clip, device = _load_clip(protocol.clip_model, protocol.clip_weights), claim_device()
    parts = []
    with torch.inference_mode():
        for pixels in _views(images, lambda image: pixels_of(clip_view(image, clip.preprocess))):
            inputs = normalised(pixels.to(device), clip.preprocess.mean, clip.preprocess.std)
            parts.append(_unit(clip.network.encode_image(inputs)))
    return _finite(torch.cat(parts), "CLIP's embeddings of images")


def embed_texts(texts: Sequence[str], protocol: Protocol) -> tuple[Tensor, Tensor]:
    """(n, e) float32 embeddings of length 1, and which texts were truncated, (n,) bool.

    Texts of more than 77 tokens are truncated as by open_clip's tokenizer, which keeps the end token. UserError if CLIP
    cannot be loaded, or its embeddings are not finite.
    """
    clip, device = _load_clip(protocol.clip_model, protocol.clip_weights), claim_device()
    tokens = clip.tokenizer(list(texts))
    one_more = clip.tokenizer(list(texts), context_length=tokens.shape[1] + 1)[:, :-1]
    with torch.inference_mode():
        parts = [_unit(clip.network.encode_text(part.to(device))) for part in tokens.split(BATCH_SIZE)]
    return _finite(torch.cat(parts), "CLIP's embeddings of prompts"), (tokens != one_more).any(dim=1)


def _views(images: Sequence[Image.Image], view: Callable[[Image.Image], Tensor]) -> Iterator[Tensor]:
    """Yields batches of views, resized on several cores."""
    with ThreadPoolExecutor(cores_of_process()) as pool:
        for first in range(0, len(images), BATCH_SIZE):
            yield torch.stack(list(pool.map(view, images[first : first + BATCH_SIZE])))


def _unit(embeddings: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu()


def _finite(values: Tensor, what: str) -> Tensor:
    if not values.isfinite().all():
        raise UserError(f"{what} are not finite: the weights are damaged, or the images are no images.")
    return values.clone()  # out of inference mode
