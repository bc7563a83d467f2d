"""What networks and duplicate search see of an image: resized pixels and hashes."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL_SIDE = 4
# The watermark detector's, which are ImageNet's.
WATERMARK_PX = 256
WATERMARK_MEAN, WATERMARK_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def watermark_view(image: Image.Image) -> Image.Image:
    """What the watermark detector sees of an RGB image, before normalisation: 256 x 256, squashed."""
    return image.resize((WATERMARK_PX, WATERMARK_PX), Image.Resampling.BILINEAR)


def pixel_sha256(image: Image.Image) -> str:
    """Hex sha256 of an RGB image's size and pixels, whatever it was encoded as."""
    digest = hashlib.sha256(b"%d %d " % image.size)
    digest.update(image.tobytes())
    return digest.hexdigest()


def thumbnail(image: Image.Image) -> bytes:
    """Mean colours of a 4 x 4 grid over an RGB image: 48 bytes."""
    return image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX).tobytes()


def gray_of(image: Image.Image) -> NDArray[np.uint8]:
    """The brightness (ITU-R 601 luma) of an RGB image, (H, W)."""
    return np.asarray(image.convert("L"))
