"""What networks and duplicate search see of a picture: resized pixels and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import imagehash
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL_SIDE = 4
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# The watermark detector's, which are ImageNet's.
WATERMARK_PX = 256
WATERMARK_MEAN, WATERMARK_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
    squashed = picture.resize((WATERMARK_PX, WATERMARK_PX), Image.Resampling.BILINEAR)
    return _normalised(squashed, WATERMARK_MEAN, WATERMARK_STD)


def perceptual_hash(picture: Image.Image) -> int:
    """The 64-bit DCT hash of a picture's brightness (imagehash.phash), as a signed integer."""
    bits = imagehash.phash(picture).hash.ravel()
    return int(np.packbits(bits).view(">i8")[0])


def pixel_sha256(picture: Image.Image) -> str:
    """Hex sha256 of an RGB picture's size and pixels, whatever it was encoded as."""
    return hashlib.sha256(b"%d %d " % picture.size + picture.tobytes()).hexdigest()


def thumbnail(picture: Image.Image) -> bytes:
    """Mean colours of a 4 x 4 grid over an RGB picture: 48 bytes."""
    return picture.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX).tobytes()


def _normalised(picture: Image.Image, mean: Iterable[float], std: Iterable[float]) -> NDArray[np.float32]:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255)
    mean_, std_ = (torch.tensor(tuple(values)).view(3, 1, 1) for values in (mean, std))
    normalised: NDArray[np.float32] = pixels.sub(mean_).div(std_).numpy()
    return normalised
