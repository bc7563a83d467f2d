"""The perceptual hash of an image that has just been decoded."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIDE, _KEPT = 32, 8
# Shrinks by whole pixels first and filters from this many times the size: a third of the time, and on copies
# of other sizes and qualities as steady as filtering all pixels.
_REDUCING_GAP = 3.0
_PRECISION = 6


def perceptual_hash(pixels: NDArray[np.uint8]) -> int:
    """The 64-bit DCT hash (pHash) of an image's brightness as a signed integer; `pixels` is (H, W, 3), BGR, or (H, W).

    It is `imagehash.phash` but for 0 to 4 bits, because it is taken from the pixels before they are encoded, and
    from fewer of them. Decoding what was stored once more would cost as much as the whole rest of the hash twice.
    """
    gray = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
    image = Image.fromarray(np.ascontiguousarray(gray))
    small = image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)
    # Rounded, so that what is zero for a flat image is zero and not a machine's rounding error.
    frequencies = np.round(_WAVES @ np.asarray(small, np.float64) @ _WAVES.T, _PRECISION)
    bits = (frequencies > np.median(frequencies)).ravel()
    return int(np.packbits(bits).view(">i8")[0])


def _waves() -> NDArray[np.float64]:
    """The first rows of the matrix of the DCT-II, (_KEPT, _SIDE)."""
    frequency, place = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None, :]
    waves: NDArray[np.float64] = 2 * np.cos(np.pi * frequency * (2 * place + 1) / (2 * _SIDE))
    return waves


_WAVES = _waves()
