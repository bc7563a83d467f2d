"""The DINOv2 network of FD-DINOv2: its graph, its weights and its preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sdtrain.errors import UserError
from sdtrain.models.clip import pixels_of
from sdtrain.models.weights import RANDOM_FULL, Published, find_weights, random_seed, read_state, seeded

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

SIDE_PX = 224
PUBLISHED: Mapping[str, Published] = {
    "dinov2-vitl14": Published(
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth", "dinov2_vitl14_pretrain.pth"
    )
}
_PATCH_PX, _TRAINED_SIDE = 14, 37
_SIDE = SIDE_PX // _PATCH_PX
_OFFSET = 0.1
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_UNUSED = {"mask_token"}


@dataclass(frozen=True)
class Size:
    """Width of the tokens, number of blocks, and heads of their attention."""

    width: int
    depth: int
    num_heads: int


VIT_L = Size(1024, 24, 16)
NARROW = Size(128, 2, 2)
"""What `random:SEED` gives, for trials."""


def make_dinov2(size: Size) -> VisionTransformer:
    """The network for (B, 3, 224, 224) views -> (B, width), the normalised class token; parameters as published.

    facebookresearch/dinov2, dinov2/models/vision_transformer.py and hubconf.py; timm's graph is the same.
    """
    from timm.models.vision_transformer import VisionTransformer  # late: costs a second

    return VisionTransformer(
        img_size=SIDE_PX,
        patch_size=_PATCH_PX,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.num_heads,
        init_values=1.0,
        num_classes=0,
        global_pool="token",
    )


def find_dinov2(weights: str) -> Path | None:
    """Finds the weights file; None for `random:SEED`. UserError if it is unavailable."""
    if random_seed(weights) is not None:
        return None
    return find_weights(weights, PUBLISHED, "name a file of them with --dinov2-weights")


def load_dinov2(weights: str, size: Size = VIT_L) -> nn.Module:
    """The network in eval mode, fp32, with `dinov2-vitl14` (the published weights) or a file's of this size.

    `random:SEED` gives a narrow network for trials, `random-full:SEED` one of the published size. UserError if there
    are no such weights, or they are another network's.
    """
    path, seed = find_dinov2(weights), random_seed(weights)
    if path is None:
        with seeded(seed):
            network = make_dinov2(VIT_L if weights.startswith(RANDOM_FULL) else NARROW)
    else:
        with torch.device("meta"):
            network = make_dinov2(size)
        network.load_state_dict(_checked(read_state(path), network, path), assign=True)
    return network.requires_grad_(False).eval()


def _checked(state: dict[str, Tensor], network: nn.Module, path: Path) -> dict[str, Tensor]:
    """The tensors as the network has them, with positions for 224 pixels."""
    state = {name: tensor.float() for name, tensor in state.items() if name not in _UNUSED}
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    wanted["pos_embed"] = (1, 1 + _TRAINED_SIDE**2, wanted["pos_embed"][2])
    for name in sorted(wanted.keys() | state.keys()):
        if name not in state or name not in wanted:
            raise UserError(f"{path} is no DINOv2 ViT-L/14: it {'lacks' if name in wanted else 'has'} {name}.")
        if tuple(state[name].shape) != wanted[name]:
            raise UserError(f"{path} is no DINOv2 ViT-L/14: {name} has shape {tuple(state[name].shape)}.")
    return state | {"pos_embed": resample_positions(state["pos_embed"])}


def resample_positions(positions: Tensor) -> Tensor:
    """(1, 1 + 37², d) -> (1, 1 + 16², d): what the published network computes from its positions for 224 pixels.

    Bicubic without smoothing, by the factor (16 + 0.1) / 37: DinoVisionTransformer.interpolate_pos_encoding, whose
    offset of 0.1 shifts the grid. timm and transformers resample otherwise, which changes the features.
    """
    token, grid = positions[:, :1], positions[:, 1:]
    grid = grid.reshape(1, _TRAINED_SIDE, _TRAINED_SIDE, -1).permute(0, 3, 1, 2)
    factor = (_SIDE + _OFFSET) / _TRAINED_SIDE
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([token, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def dinov2_view(image: Image.Image) -> Tensor:
    """Resizes an RGB image for DINOv2 as Stein et al. do: (3, 224, 224), normalised by ImageNet's mean and deviation.

    Pillow's bicubic, smoothed, to a square whatever the shape (layer6ai-labs/dgm-eval, dgm_eval/models/dinov2.py).
    """
    pixels = pixels_of(image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    return (pixels - mean) / std
