"""How a CLIP model is shown images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """How a CLIP model wants its images; OpenAI's way but for the size, unless told otherwise.

    Attributes:
        size_px: side of the square that it sees.
        mean: of its training images' channels, from 0 to 1.
        std: likewise.
        resample: "bicubic" or "bilinear".
        squash: both sides are brought to `size_px`; else the shorter one, and the centre is cut out.
    """

    size_px: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resample: str = "bicubic"
    squash: bool = False

    def resized_px(self, width: int, height: int) -> tuple[int, int]:
        """Width and height before the centre is cut out: the longer side rounded down (openai/CLIP, clip/clip.py)."""
        if self.squash:
            return self.size_px, self.size_px
        short = min(width, height)
        wide, high = (self.size_px if side == short else int(self.size_px * side / short) for side in (width, height))
        return wide, high

    def centre(self, width: int, height: int) -> tuple[int, int]:
        """Left and top edge of the centre."""
        return round((width - self.size_px) / 2.0), round((height - self.size_px) / 2.0)


def clip_view(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """What CLIP sees of an RGB image, before normalisation: `size_px` square, resized by Pillow."""
    size = preprocess.resized_px(*image.size)
    resized = image.resize(size, Image.Resampling[preprocess.resample.upper()])
    left, top = preprocess.centre(*size)
    return resized.crop((left, top, left + preprocess.size_px, top + preprocess.size_px))


def pixels_of(image: Image.Image) -> Tensor:
    """An RGB image as (H, W, 3) uint8."""
    return torch.from_numpy(np.array(image))


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 as networks want it, on the same device."""
    # Divided by a tensor, because CUDA multiplies by the reciprocal of a number, which is not bit for bit the same.
    scale, mean_, std_ = (
        torch.tensor(tuple(values), device=pixels.device).view(-1, 1, 1) for values in ((255.0,), mean, std)
    )
    return pixels.permute(0, 3, 1, 2).float().div(scale).sub(mean_).div(std_)
