"""Turns a fetched body into the stored image: checked, upright RGB, resized, encoded."""

from __future__ import annotations

import logging
import math
import threading
from contextlib import nullcontext
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from sdtrain.dataset.config import DownloadConfig
from sdtrain.images.decode import ImageError, upright_rgb
from sdtrain.images.header import Header, read_header
from sdtrain.images.perceptual_hash import perceptual_hash
from sdtrain.images.resize import Pixels, ResizeEngine, decode_scaled

_BIG_PIXELS = 2**24
_OF_UNPROVEN_SIZE = ("avif", "jxl")
"""A header may promise less than the data hold; libavif stops at 2**28 pixels."""
_HASH_REDUCING_GAP = 3.0  # a full filter would add 15% to an image's time
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredImage:
    """An image as stored in the shard; sizes are of the upright image, originals as fetched.

    `extension` is "jpg", "png", "webp", "avif" or "jxl". `phash` is of the pixels before encoding; decoding again for
    the exact hash would cost twice as much.
    """

    content: bytes
    extension: str
    width: int
    height: int
    original_width: int
    original_height: int
    phash: int


class ImageMaker:
    """Makes stored images with a recipe's settings; thread-safe.

    Upright 8-bit RGB images go to img2dataset's resizer unchanged, so that their pixels are img2dataset's; others are
    converted first, as `sdtrain.images.decode` describes.

    `reencode` decides when the fetched bytes are kept:

    - always: never, as in img2dataset;
    - if_changed: if the image is plain, small enough, and already in `encode_format`;
    - never: always, whatever their kind and orientation, as long as they are JPEG, PNG, WebP, AVIF or JPEG XL.
    """

    def __init__(self, config: DownloadConfig) -> None:
        self._config = config
        self._engine = ResizeEngine(config)
        # One big image at a time: each may take gigabytes, and a few together all of the memory.
        self._big = threading.Lock()

    def __call__(self, content: bytes) -> StoredImage:
        """Makes the stored image of a fetched body; ImageError says why there is none."""
        try:
            header = read_header(content, self._config.max_pixels)
            width, height = header.image.size
            is_big = width * height > _BIG_PIXELS or header.extension in _OF_UNPROVEN_SIZE
            with self._big if is_big else nullcontext():
                return self._make(content, header)
        except (ImageError, MemoryError):
            raise
        except Exception as error:
            # An unforeseen failure on hostile bytes must lose one image, not the shard, but must be reported.
            _log.exception("Unexpected failure of an image")
            raise ImageError("not_an_image", f"unexpected {type(error).__name__}") from error

    def _make(self, content: bytes, header: Header) -> StoredImage:
        never = self._config.reencode == "never"
        if never and header.extension is None:
            raise ImageError("other_format", f"{header.image.format}, which is not stored as it is")
        may_stay = (
            self._config.reencode == "if_changed" and header.is_plain and header.extension == self._config.encode_format
        )
        self._check_enlarged(header.image.size)
        denominator = self._denominator(header) if self._config.scaled_decoding else 1
        if denominator > 1:
            resized = self._engine(content, decode_scaled(content, denominator))
            resized.original_width, resized.original_height = header.image.size
        else:
            pixels = None if header.is_plain else _bgr(header)
            resized = self._engine(content, pixels, may_stay=may_stay, must_stay=never)
        height, width = resized.pixels.shape[:2]
        return StoredImage(
            content=content if resized.content is None else resized.content,
            extension=header.extension if never and header.extension else self._config.encode_format,
            width=width,
            height=height,
            original_width=resized.original_width,
            original_height=resized.original_height,
            phash=_hash_of(resized.pixels),
        )

    def _check_enlarged(self, size: tuple[int, int]) -> None:
        """Refuses a long, thin image that would fill the memory when enlarged."""
        if self._config.resize_mode in ("keep_ratio", "center_crop") and not self._config.resize_only_if_bigger:
            scale = self._config.image_size / min(size)
            if scale > 1 and scale**2 * math.prod(size) > self._config.max_pixels:
                raise ImageError("resize_failed", "enlarged, it would have more than max_pixels")

    def _denominator(self, header: Header) -> int:
        """What the JPEG decoder may divide both sides by, so that the stored image has the same size."""
        if not (header.is_plain and header.extension == "jpg"):
            return 1
        width, height = header.image.size
        side = (min if self._config.resize_mode in ("keep_ratio", "center_crop") else max)(width, height)
        # The resizer crops and pads only what it scales.
        smallest = self._config.image_size + (self._config.resize_mode in ("center_crop", "border"))
        numbers = (number for number in (2, 4, 8) if width % number == height % number == 0)
        return max((number for number in numbers if side >= number * smallest), default=1)


def _bgr(header: Header) -> Pixels:
    return cv2.cvtColor(np.asarray(upright_rgb(header.image)), cv2.COLOR_RGB2BGR)  # type: ignore[return-value]


def _hash_of(pixels: Pixels) -> int:
    gray = Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY))
    return perceptual_hash(gray, _HASH_REDUCING_GAP)
