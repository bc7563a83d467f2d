"""Measures what SCORE's preprocessing takes of one core for a JPEG of 733 x 447 pixels, part by part.

Processor time, and the median of several turns, in which every image takes every part, so that other work on the
machine meets all of them alike. `by_pillow` is the whole with Pillow's own filters for views, thumbnail and hash.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from filters.score.preprocess import (
    THUMBNAIL,
    WATERMARK_VIEW,
    RequiredViews,
    Sample,
    clip_view,
    gray_of,
    measure,
    pixel_sha256,
    preprocess,
)
from sdtrain.images.decode import decode_rgb
from sdtrain.images.perceptual_hash import perceptual_hash
from sdtrain.images.resample import View, resample
from sdtrain.models.clip import Preprocess
from sdtrain.models.clip import clip_view as clip_view_by_pillow

SIZE_PX = (733, 447)
TARGET_MS = 9.0
_TURNS = 9
_CLIP = Preprocess(224)


def preprocessing_ms(contents: list[bytes]) -> dict[str, float]:
    """Milliseconds an image, by part, then `total` and `by_pillow`."""
    torch.zeros(1 << 22)  # malloc keeps what is freed once it has freed as much as a network's batch, as in SCORE
    spent = defaultdict[str, list[float]](list)
    for turn in range(1 + _TURNS):
        for content in contents:
            for name, seconds in _times(content):
                if turn:  # the first loads libraries and computes weights
                    spent[name].append(1000 * seconds)
    return {name: round(statistics.median(values), 2) for name, values in spent.items()}


def show(found: dict[str, float]) -> None:
    """Prints the parts beside the total and its target."""
    print(f"preprocessing of a JPEG of {SIZE_PX[0]} x {SIZE_PX[1]} pixels, ms of one core:")
    for name, ms in found.items():
        target = f"   target {TARGET_MS:g}" if name == "total" else ""
        print(f"  {name:9} {ms:6.2f}{target}")


def _times(content: bytes) -> list[tuple[str, float]]:
    times: list[tuple[str, float]] = []

    def timed(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        started = time.process_time()
        found = work(*arguments)
        times.append((name, time.process_time() - started))
        return found

    image = timed("decode", decode_rgb, content)
    pixels = timed("pixels", np.asarray, image)
    _, squashed, _ = timed("views", resample, pixels, [THUMBNAIL, WATERMARK_VIEW, clip_view(_CLIP, *image.size)])
    timed("phash", perceptual_hash, image)
    timed("digest", pixel_sha256, pixels)
    timed("measures", lambda: measure(gray_of(Image.fromarray(squashed))))
    item = timed("total", preprocess, Sample("key", "uid", {"jpg": content}), RequiredViews(_CLIP, watermark=True))
    row, clip, watermark = timed("by_pillow", _by_pillow, content)
    assert row.items() <= item.row.items()
    assert np.array_equal(clip, item.clip)
    assert np.array_equal(watermark, item.watermark)
    return times


def _by_pillow(content: bytes) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    image = decode_rgb(content)
    squashed = _resized(image, WATERMARK_VIEW)
    row = {
        "pixel_sha256": pixel_sha256(image),
        "phash": perceptual_hash(image, reducing_gap=math.inf),  # which reduces by nothing: the whole filter
        "thumbnail": _resized(image, THUMBNAIL).tobytes(),
        **measure(gray_of(squashed)),
    }
    return row, np.array(clip_view_by_pillow(image, _CLIP)), np.array(squashed)


def _resized(image: Image.Image, view: View) -> Image.Image:
    return image.resize(view.size_px, view.filter)
