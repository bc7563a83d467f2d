"""Loads open_clip's CLIP models, with their tokenizer and preprocessing."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdtrain.errors import UserError
from sdtrain.images.crops import resized_part
from sdtrain.models.weights import find_weights, random_seed, seeded

_CLIP_MODELS = Path(__file__).parent / "clip_models"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """A CLIP model's preprocessing; all defaults but the size are OpenAI's.

    `mean` and `std` are of the training images' channels, from 0 to 1; `resample` is "bicubic" or "bilinear". `squash`
    resizes both sides to `size_px`; otherwise the shorter one is, and the centre cropped.
    """

    size_px: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resample: str = "bicubic"
    squash: bool = False

    def resized_px(self, width: int, height: int) -> tuple[int, int]:
        """Width and height before the centre crop: the longer side rounded down (openai/CLIP, clip/clip.py)."""
        if self.squash:
            return self.size_px, self.size_px
        short = min(width, height)
        wide, high = (self.size_px if side == short else int(self.size_px * side / short) for side in (width, height))
        return wide, high

    def centre(self, width: int, height: int) -> tuple[int, int]:
        """Left and top edge of the centre crop."""
        return round((width - self.size_px) / 2.0), round((height - self.size_px) / 2.0)


def clip_view(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """CLIP's view of an RGB image, before normalisation: `size_px` square, resized by Pillow."""
    size = preprocess.resized_px(*image.size)
    left, top = preprocess.centre(*size)
    edges = (left, top, left + preprocess.size_px, top + preprocess.size_px)
    return resized_part(image, size, edges, Image.Resampling[preprocess.resample.upper()])


def pixels_of(image: Image.Image) -> Tensor:
    """An RGB image as (H, W, 3) uint8."""
    return torch.from_numpy(np.array(image))


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) normalised float32, on the same device."""
    # Divided by a tensor: CUDA multiplies by a number's reciprocal, which is not bit-identical.
    scale, mean_, std_ = (
        torch.tensor(tuple(values), device=pixels.device).view(-1, 1, 1) for values in ((255.0,), mean, std)
    )
    return pixels.permute(0, 3, 1, 2).float().div(scale).sub(mean_).div(std_)


def load_clip(model: str, weights: str) -> tuple[Any, Any]:
    """An open_clip model in eval mode, and its tokenizer.

    UserError for an unknown model or weights, or weights trained with QuickGELU (OpenAI's) in a model without it.
    """
    import open_clip

    config = _config(model)
    known = open_clip.get_pretrained_cfg(model, weights)
    if known.get("quick_gelu") and not config.get("quick_gelu"):
        raise UserError(f"The weights '{weights}' need QuickGELU: set clip_model to {model}-quickgelu.")
    seed = random_seed(weights)
    source = None if seed is not None else weights if known else _readable(find_weights(weights, {}))
    try:
        with seeded(seed), _retrying_quietly():
            network = open_clip.create_model(model, pretrained=source)
        return network.eval(), open_clip.get_tokenizer(model)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"CLIP {model} with weights '{weights}' cannot be loaded ({error}). Without a connection, set "
            "clip_weights to a file, or do without the CLIP scores."
        ) from error


@contextmanager
def _retrying_quietly() -> Iterator[None]:
    """Without the hub's lines about each retry of a download: a failure in the end is one sentence."""
    retries = logging.getLogger("huggingface_hub.utils._http")
    before = retries.level
    retries.setLevel(logging.ERROR)
    try:
        yield
    finally:
        retries.setLevel(before)


def _readable(path: Path) -> str:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(Path(name).name == "constants.pkl" for name in archive.namelist()):
                raise UserError(
                    f"{path} is a program for TorchScript, as OpenAI published CLIP, and to read it could run "
                    "someone's code. Take open_clip_model.safetensors; for ViT-L-14-quickgelu it lies on the hub in "
                    "timm/vit_large_patch14_clip_224.openai and has the same weights."
                )
    return str(path)


def embedding_size(model: str) -> int:
    """The number of the model's embedding dimensions; UserError if open_clip does not know the model."""
    return int(_config(model)["embed_dim"])


def clip_preprocess(network: Any, model: str, weights: str) -> Preprocess:
    """The preprocessing of the model's training.

    Published weights record theirs. A file's is that of all published weights of the same model if they agree, else
    OpenAI's. UserError if it is of a kind that we do not support.
    """
    import open_clip

    wanted = dict(network.visual.preprocess_cfg)
    if not open_clip.get_pretrained_cfg(model, weights):
        ways = [open_clip.get_pretrained_cfg(model, tag) for tag in open_clip.list_pretrained_tags_by_model(model)]
        names = ("mean", "std", "interpolation", "resize_mode")
        alike = {tuple(way.get(name) for name in names) for way in ways}
        wanted |= dict(zip(names, alike.pop(), strict=True)) if len(alike) == 1 else {}
    sides = wanted["size"] if isinstance(wanted["size"], tuple | list) else (wanted["size"],)
    squash = wanted["resize_mode"] == "squash"
    if len(set(sides)) != 1 or wanted["resize_mode"] not in ("shortest", "squash"):
        raise UserError(
            f"clip_model: {model} wants images of {wanted['size']} pixels by '{wanted['resize_mode']}'; only "
            "squares by 'shortest' or 'squash' are made here. Choose another model."
        )
    return Preprocess(int(sides[0]), tuple(wanted["mean"]), tuple(wanted["std"]), wanted["interpolation"], squash)


def _config(model: str) -> dict[str, Any]:
    import open_clip

    open_clip.add_model_config(_CLIP_MODELS)
    config: dict[str, Any] | None = open_clip.get_model_config(model)
    if config is None:
        raise UserError(f"clip_model: open_clip knows no model '{model}'. Try ViT-L-14-quickgelu.")
    return config
