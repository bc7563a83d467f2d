"""Recognises the colour and shape in a demo image from its pixels alone, without learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from sdtrain.demo.images import COLORS, SHAPES, shape_mask

# Chroma (max minus min of R, G, B): shapes have at least 150, backgrounds less than 30.
MIN_CHROMA = 60
# The shape's share of the image: drawn ones have about 0.1 (star) to 0.4 (square).
MIN_AREA, MAX_AREA = 0.03, 0.65
# Neighbouring colours differ by at least 41 degrees.
MAX_HUE_DISTANCE = 25.0
MIN_HUE_AGREEMENT = 0.8
MIN_IOU = 0.65
_CELLS = 32
_ANGLES = range(-15, 16, 3)


@dataclass(frozen=True)
class Verdict:
    """The colour and shape that an image clearly shows, else None."""

    color: str | None
    shape: str | None


@dataclass(frozen=True)
class Agreement:
    """Fractions (0 to 1) of images that show the colour, the shape, and both that were asked for."""

    color: float
    shape: float
    both: float
    num_images: int


def classify(image: Image.Image) -> Verdict:
    """The colour and shape in one RGB image of any size; tuned for 64 x 64.

    The saturated pixels give the nearest demo hue, and the shape whose mask, slightly rotated, overlaps best.
    """
    pixels = np.asarray(image.convert("RGB"), np.float32)
    mask = _saturated(pixels)
    if not MIN_AREA <= mask.mean() <= MAX_AREA:
        return Verdict(None, None)
    hue = _common_hue(pixels[mask])
    if hue is None:
        return Verdict(None, None)  # saturated pixels of all hues are noise
    return Verdict(_nearest_color(hue), _shape(mask))


def agreement(images: Sequence[Image.Image], wanted: Sequence[tuple[str, str]]) -> Agreement:
    """How often the images show the wanted (colour, shape), e.g. `pair_in` of a prompt.

    ValueError if there are no images, or not as many as pairs.
    """
    if not images:
        raise ValueError("agreement() needs at least one image")
    verdicts = [classify(image) for image in images]
    right = np.array(
        [(v.color == color, v.shape == shape) for v, (color, shape) in zip(verdicts, wanted, strict=True)], bool
    )
    color, shape = right.mean(axis=0)
    return Agreement(float(color), float(shape), float(right.all(axis=1).mean()), len(images))


def pair_in(prompt: str) -> tuple[str, str]:
    """The (colour, shape) that a prompt names; ValueError if it names none, or several."""
    words = prompt.lower().replace(",", " ").split()
    colors, shapes = [w for w in words if w in COLORS], [w for w in words if w in SHAPES]
    if len(colors) != 1 or len(shapes) != 1:
        raise ValueError(f"'{prompt}' must name one colour and one shape of the demo")
    return colors[0], shapes[0]


def _saturated(pixels: np.ndarray) -> np.ndarray:
    """(H, W) bool: chroma over half of the maximum, which splits a blurred edge in its middle."""
    chroma = pixels.max(axis=2) - pixels.min(axis=2)
    threshold = max(MIN_CHROMA, 0.5 * float(np.quantile(chroma, 0.97)))
    mask = Image.fromarray(np.where(chroma > threshold, 255, 0).astype(np.uint8))
    # Removes isolated pixels.
    return np.asarray(mask.filter(ImageFilter.MedianFilter(3))) > 0


def _common_hue(pixels: np.ndarray) -> float | None:
    """The median hue in degrees of (N, 3) pixels; None if they share none."""
    hues = np.radians(_hues(pixels))
    mean = np.exp(1j * hues).mean()
    if abs(mean) < MIN_HUE_AGREEMENT:
        return None
    # A median of angles, taken around their mean direction.
    offsets = np.angle(np.exp(1j * hues) / mean)
    return float(np.degrees(np.angle(mean) + np.median(offsets)))


def _nearest_color(hue: float) -> str | None:
    distances = {name: abs((hue - _hue_of(name) + 180) % 360 - 180) for name in COLORS}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= MAX_HUE_DISTANCE else None


def _hues(pixels: np.ndarray) -> np.ndarray:
    """Hue in degrees of (N, 3) pixels that are not grey."""
    red, green, blue = pixels.T
    return np.degrees(np.arctan2(3**0.5 * (green - blue), 2 * red - green - blue))


@cache
def _hue_of(color: str) -> float:
    return float(_hues(np.array([COLORS[color]], np.float32))[0])


def _shape(mask: np.ndarray) -> str | None:
    """The demo shape whose mask overlaps best, by intersection over union."""
    framed = _framed(mask)
    overlaps = {
        shape: max(float((framed & reference).sum() / (framed | reference).sum()) for reference in _references(shape))
        for shape in SHAPES
    }
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= MIN_IOU else None


@cache
def _references(shape: str) -> list[np.ndarray]:
    size, center = (4 * _CELLS, 4 * _CELLS), (2.0 * _CELLS, 2.0 * _CELLS)
    masks = [shape_mask(shape, size, center, 1.5 * _CELLS, angle) for angle in _ANGLES]
    return [_framed(np.asarray(mask) > 127) for mask in masks]


def _framed(mask: np.ndarray) -> np.ndarray:
    """The mask's bounding box as (_CELLS, _CELLS) bool."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = Image.fromarray(box.astype(np.uint8) * 255).resize((_CELLS, _CELLS), Image.Resampling.BILINEAR)
    return np.asarray(image) > 127
