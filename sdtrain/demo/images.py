"""Draws the demo's images: one shape on a background.

Only the shape is saturated, so that `sdtrain.demo.checker` recognises it from pixels alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 30, 36),
    "yellow": (240, 212, 20),
    "green": (34, 170, 50),
    "cyan": (20, 196, 214),
    "blue": (36, 62, 216),
    "pink": (236, 50, 180),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
BACKGROUNDS = ("plain", "gradient", "striped", "checkered", "dotted", "noisy")

# One pair per colour and shape: each word is learnt, only the pairing is new.
UNSEEN_PAIRS = frozenset(zip(COLORS, ("star", "ring", "circle", "cross", "square", "triangle"), strict=True))
SEEN_PAIRS = tuple((c, s) for c in COLORS for s in SHAPES if (c, s) not in UNSEEN_PAIRS)


@dataclass(frozen=True)
class Scene:
    """The content of one image; lengths are fractions of its short side."""

    color: str
    shape: str
    background: str
    radius: float
    center: tuple[float, float]
    angle: float
    seed: int


def random_scene(rng: np.random.Generator, color: str, shape: str) -> Scene:
    """A scene with this colour and shape, otherwise random."""
    return Scene(
        color=color,
        shape=shape,
        background=str(rng.choice(BACKGROUNDS)),
        radius=float(rng.uniform(0.26, 0.36)),
        center=(float(rng.uniform(0.42, 0.58)), float(rng.uniform(0.42, 0.58))),
        angle=float(rng.uniform(-12, 12)),
        seed=int(rng.integers(2**31)),
    )


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A random description of the scene."""
    templates = (
        "a {color} {shape}",
        "a {color} {shape} on a {background} background",
        "a picture of a {color} {shape}",
        "{color} {shape}, {background} background",
    )
    return str(rng.choice(templates)).format(color=scene.color, shape=scene.shape, background=scene.background)


def draw(scene: Scene, width_px: int, height_px: int) -> Image.Image:
    """Renders `scene` as an RGB image; the same scene and size give the same pixels."""
    rng = np.random.default_rng(scene.seed)
    image = _BACKGROUNDS[scene.background](rng, width_px, height_px)
    short_px = min(width_px, height_px)
    center = (width_px / 2 + (scene.center[0] - 0.5) * short_px, height_px / 2 + (scene.center[1] - 0.5) * short_px)
    jitter = rng.integers(-10, 11, 3)
    color = tuple(int(np.clip(c + j, 0, 255)) for c, j in zip(COLORS[scene.color], jitter, strict=True))
    mask = shape_mask(scene.shape, (width_px, height_px), center, scene.radius * short_px, scene.angle)
    image.paste(color, mask=mask)
    return image


def shape_mask(
    shape: str, size_px: tuple[int, int], center: tuple[float, float], radius_px: float, angle: float
) -> Image.Image:
    """An "L" image, 255 inside the shape; `angle` in degrees, counted clockwise."""
    mask = Image.new("L", size_px, 0)
    pen = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        pen.ellipse(_box(center, radius_px), fill=255)
        if shape == "ring":
            pen.ellipse(_box(center, radius_px * 0.55), fill=0)
        return mask
    pen.polygon([_turn(p, center, radius_px, angle) for p in _OUTLINES[shape]], fill=255)
    return mask


def watermark(image: Image.Image, text: str = "SAMPLE  STOCK") -> Image.Image:
    """The image with a semi-transparent stock agency text across it."""
    overlay = Image.new("RGBA", image.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(overlay)
    size_px = max(16, image.width // 9)
    for row in range(3):
        xy = (image.width * 0.04, image.height * (0.14 + 0.3 * row))
        pen.text(xy, text, fill=(255, 255, 255, 150), font=ImageFont.load_default(size_px))
    return Image.alpha_composite(image.convert("RGBA"), overlay).convert("RGB")


def spoil(image: Image.Image) -> Image.Image:
    """A blurred, washed-out version, for a low aesthetic score."""
    blurred = image.filter(ImageFilter.GaussianBlur(image.width / 24))
    return Image.blend(blurred, Image.new("RGB", image.size, (128, 128, 128)), 0.55)


def _box(center: tuple[float, float], radius: float) -> tuple[float, float, float, float]:
    return (center[0] - radius, center[1] - radius, center[0] + radius, center[1] + radius)


def _turn(point: tuple[float, float], center: tuple[float, float], radius: float, angle: float) -> tuple[float, float]:
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    x, y = point
    return (center[0] + radius * (x * cos - y * sin), center[1] + radius * (x * sin + y * cos))


def _star() -> list[tuple[float, float]]:
    radii = [1.08 if i % 2 == 0 else 0.46 for i in range(10)]
    return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]


def _cross(arm: float = 0.34) -> list[tuple[float, float]]:
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    points = []
    for _ in range(4):
        points += quarter
        quarter = [(-y, x) for x, y in quarter]
    return points


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0.0, -1.05), (1.0, 0.78), (-1.0, 0.78)],
    "star": _star(),
    "cross": _cross(),
}


def _muted(rng: np.random.Generator) -> np.ndarray:
    return np.clip(rng.uniform(70, 225) + rng.uniform(-12, 12, 3), 0, 255)


def _flat(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), tuple(int(v) for v in _muted(rng)))


def _gradient(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    corners = np.stack([_muted(rng) for _ in range(4)]).reshape(2, 2, 3).astype(np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def _striped(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    image, other = _flat(rng, width, height), tuple(int(v) for v in _muted(rng))
    pen, step = ImageDraw.Draw(image), width / rng.integers(3, 6)
    for i in range(-8, 16):
        x = i * step
        pen.polygon([(x, 0), (x + step / 2, 0), (x + step / 2 - height / 2, height), (x - height / 2, height)], other)
    return image


def _checkered(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    image, other = _flat(rng, width, height), tuple(int(v) for v in _muted(rng))
    pen, cells = ImageDraw.Draw(image), int(rng.integers(3, 6))
    side = width / cells
    for row in range(int(height / side) + 1):
        for column in range(row % 2, cells, 2):
            pen.rectangle((column * side, row * side, (column + 1) * side, (row + 1) * side), other)
    return image


def _dotted(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    image, other = _flat(rng, width, height), tuple(int(v) for v in _muted(rng))
    pen, step = ImageDraw.Draw(image), width / rng.integers(4, 7)
    for row in range(int(height / step) + 1):
        for column in range(int(width / step) + 1):
            pen.ellipse(_box(((column + 0.5) * step, (row + 0.5) * step), step * 0.28), other)
    return image


def _noisy(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    coarse = _muted(rng) + rng.normal(0, 14, (12, 12, 1))
    small = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


_BACKGROUNDS: dict[str, Callable[[np.random.Generator, int, int], Image.Image]] = {
    "plain": _flat,
    "gradient": _gradient,
    "striped": _striped,
    "checkered": _checkered,
    "dotted": _dotted,
    "noisy": _noisy,
}
