"""The aesthetic and safety heads on CLIP's embeddings, and the watermark detector."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from filters.score.weights import find_weights
from sdtrain.errors import UserError
from sdtrain.models.weights import RANDOM_FULL, random_seed, read_state, seeded

EMBEDDING_SIZE = 768
# Input size, then output sizes, of the five linear layers of LAION's aesthetic predictor V2.
_AESTHETIC_SIZES = (EMBEDDING_SIZE, 1024, 128, 64, 16, 1)
_AESTHETIC_LAYERS = (0, 2, 4, 6, 7)


class AestheticHead(nn.Module):
    """LAION's aesthetic predictor V2 as one matrix-vector product.

    Its five linear layers have no activation between them (christophschuhmann/improved-aesthetic-predictor,
    simple_inference.py), so they are one affine map: w·x + b of the L2-normalised embedding.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        weight, bias = _collapse(state)
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())

    def forward(self, embeddings: Tensor) -> Tensor:
        """Scores (B,) of CLIP ViT-L/14 image embeddings (B, 768), of any norm."""
        return nn.functional.normalize(embeddings, dim=-1) @ self.weight + self.bias


class AestheticV1Head(nn.Module):
    """LAION's first aesthetic predictor (LAION-AI/aesthetic-predictor), one linear layer; its scale is not V2's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(EMBEDDING_SIZE, 1)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Scores (B,) of CLIP ViT-L/14 image embeddings (B, 768), of any norm."""
        scores: Tensor = self.linear(nn.functional.normalize(embeddings, dim=-1))[:, 0]
        return scores


class SafetyHead(nn.Module):
    """LAION's NSFW detector for ViT-L/14 embeddings (LAION-AI/CLIP-based-NSFW-Detector, src/models.py)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = _Standardise(EMBEDDING_SIZE)
        self.linear_1 = nn.Linear(EMBEDDING_SIZE, 64)
        self.linear_2 = nn.Linear(64, 512)
        self.linear_3 = nn.Linear(512, 256)
        self.linear_4 = nn.Linear(256, 1)

    def forward(self, embeddings: Tensor) -> Tensor:
        """P(unsafe), (B,), of embeddings (B, 768)."""
        hidden = self.norm(nn.functional.normalize(embeddings, dim=-1))
        for layer in (self.linear_1, self.linear_2, self.linear_3):
            hidden = torch.relu(layer(hidden))
        return torch.sigmoid(self.linear_4(hidden))[:, 0]


class WatermarkClassifier(nn.Module):
    """LAION's watermark detector (LAION-AI/LAION-5B-WatermarkDetection): EfficientNet-B3 with a small classifier.

    `backbone` is a timm name; the published weights are for `efficientnet_b3`.
    """

    def __init__(self, backbone: str = "efficientnet_b3"):
        super().__init__()
        network: Any = timm.create_model(backbone, pretrained=False, num_classes=0)
        layers = [nn.Linear(network.num_features, 625), nn.ReLU(), nn.Dropout(0.3), nn.Linear(625, 256)]
        network.classifier = nn.Sequential(*layers, nn.ReLU(), nn.Linear(256, 2))
        self.backbone: nn.Module = network

    def forward(self, pixels: Tensor) -> Tensor:
        """P(watermark), (B,), of (B, 3, 256, 256) images, normalised by ImageNet's moments."""
        return torch.softmax(self.backbone(pixels), dim=-1)[:, 0]


class _Standardise(nn.Module):
    """Computes (x - mean) / (sqrt(variance) + 1e-10), with the moments stored in the weights."""

    mean: Tensor
    variance: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))

    def forward(self, values: Tensor) -> Tensor:
        return (values - self.mean) / (self.variance.sqrt() + 1e-10)


def load_aesthetic(name: str) -> AestheticHead:
    """Loads the aesthetic head (V2); raises `UserError` for other weights, such as V1's, whose scale differs."""
    seed = random_seed(name)
    if seed is not None:
        return AestheticHead(_random_aesthetic(seed)).eval()
    path = find_weights(name)
    state = read_state(path)
    if set(state) == {"weight", "bias"}:
        raise UserError(
            f"{path} is the aesthetic predictor V1, whose scale is another; name it in score.aesthetic_v1_weights."
        )
    try:
        return AestheticHead(state).eval()
    except (KeyError, RuntimeError) as error:
        raise UserError(f"{path} does not hold the aesthetic predictor V2 for ViT-L/14: {error}") from error


def load_aesthetic_v1(name: str) -> AestheticV1Head:
    """Loads the first aesthetic head (V1); raises `UserError` for other weights, such as V2's, whose scale differs."""
    return _with_weights(AestheticV1Head, name)


def load_safety(name: str) -> SafetyHead:
    """Loads the NSFW head; raises `UserError` for another network's weights."""
    return _with_weights(SafetyHead, name)


def load_watermark(name: str) -> WatermarkClassifier:
    """Loads the watermark detector; raises `UserError` for another network's weights.

    For trials, `random:SEED` uses a tiny backbone, `random-full:SEED` the published one.
    """
    tiny = random_seed(name) is not None and not name.startswith(RANDOM_FULL)
    return _with_weights(lambda: WatermarkClassifier("test_efficientnet" if tiny else "efficientnet_b3"), name)


def _with_weights(build: Any, name: str) -> Any:
    seed = random_seed(name)
    with seeded(seed):
        network = build()
    if seed is None:
        path = find_weights(name)
        try:
            network.load_state_dict(_fitted(read_state(path), network))
        except RuntimeError as error:
            raise UserError(f"{path} does not hold the weights of {type(network).__name__}: {error}") from error
    return network.eval()


def _fitted(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Renames published weights of a bare backbone (watermark) or a bare linear layer (aesthetic V1)."""
    if isinstance(network, AestheticV1Head) and set(state) == {"weight", "bias"}:
        return {f"linear.{key}": value for key, value in state.items()}
    if isinstance(network, WatermarkClassifier) and not any(key.startswith("backbone.") for key in state):
        return {f"backbone.{key}": value for key, value in state.items()}
    return state


def _random_aesthetic(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer, size_in, size_out in zip(_AESTHETIC_LAYERS, _AESTHETIC_SIZES[:-1], _AESTHETIC_SIZES[1:], strict=True):
        state[f"layers.{layer}.weight"] = torch.randn(size_out, size_in, generator=generator) / size_in**0.5
        state[f"layers.{layer}.bias"] = torch.zeros(size_out)
    state[f"layers.{_AESTHETIC_LAYERS[-1]}.bias"] += 5.0
    return state


def _collapse(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Multiplies the layers in float64: weight (768,), bias ()."""
    matrix, bias = torch.eye(EMBEDDING_SIZE, dtype=torch.float64), torch.zeros(EMBEDDING_SIZE, dtype=torch.float64)
    for layer in _AESTHETIC_LAYERS:
        weight = state[f"layers.{layer}.weight"].double()
        matrix, bias = weight @ matrix, weight @ bias + state[f"layers.{layer}.bias"].double()
    return matrix[0], bias[0]
