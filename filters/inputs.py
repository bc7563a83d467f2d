"""What networks and duplicate search see of a picture: resized pixels and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import imagehash
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

THUMBNAIL_SIDE = 4
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# The watermark detector's, which are ImageNet's.
WATERMARK_PX = 256
WATERMARK_MEAN, WATERMARK_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """How a CLIP model wants its pictures; OpenAI's way but for the size, unless told otherwise.

    Attributes:
        size_px: side of the square that it sees.
        mean: of its training pictures' channels, from 0 to 1.
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


def clip_view(picture: Image.Image, preprocess: Preprocess) -> Image.Image:
    """What CLIP sees of an RGB picture, before normalisation: `size_px` square, resized by Pillow."""
    size = preprocess.resized_px(*picture.size)
    resized = picture.resize(size, Image.Resampling[preprocess.resample.upper()])
    left, top = preprocess.centre(*size)
    return resized.crop((left, top, left + preprocess.size_px, top + preprocess.size_px))


def watermark_view(picture: Image.Image) -> Image.Image:
    """What the watermark detector sees of an RGB picture, before normalisation: 256 x 256, squashed."""
    return picture.resize((WATERMARK_PX, WATERMARK_PX), Image.Resampling.BILINEAR)


def pixels_of(picture: Image.Image) -> Tensor:
    """An RGB picture as (H, W, 3) uint8."""
    return torch.from_numpy(np.array(picture))


def normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 as networks want it, on the same device."""
    # Divided by a tensor, because CUDA multiplies by the reciprocal of a number, which is not bit for bit the same.
    scale, mean_, std_ = (
        torch.tensor(tuple(values), device=pixels.device).view(-1, 1, 1) for values in ((255.0,), mean, std)
    )
    return pixels.permute(0, 3, 1, 2).float().div(scale).sub(mean_).div(std_)


def perceptual_hash(picture: Image.Image) -> int:
    """The 64-bit DCT hash of a picture's brightness (imagehash.phash), as a signed integer."""
    bits = imagehash.phash(picture).hash.ravel()
    return int(np.packbits(bits).view(">i8")[0])


def pixel_sha256(picture: Image.Image) -> str:
    """Hex sha256 of an RGB picture's size and pixels, whatever it was encoded as."""
    digest = hashlib.sha256(b"%d %d " % picture.size)
    digest.update(picture.tobytes())
    return digest.hexdigest()


def thumbnail(picture: Image.Image) -> bytes:
    """Mean colours of a 4 x 4 grid over an RGB picture: 48 bytes."""
    return picture.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX).tobytes()


def gray_of(picture: Image.Image) -> NDArray[np.uint8]:
    """The brightness (ITU-R 601 luma) of an RGB picture, (H, W)."""
    return np.asarray(picture.convert("L"))
