"""Images like photographs."""

from __future__ import annotations

import io
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

SIDES_PX = (512, 1600)
_OCTAVES = (2, 4, 8, 16, 32, 64, 128, 256)
_COLOUR_OCTAVE, _CONTRAST = 8, 45
_SHAPES = 12
_QUALITY = 80


def draw_photo(seed: int) -> bytes:
    """A JPEG with a photograph's statistics: detail falling off with its fineness, soft colours, sharp edges."""
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(*SIDES_PX, size=2))
    pixels = np.zeros((height, width, 3), np.float32)
    for octave in _OCTAVES:
        # Colour is coarser than brightness, as in photographs.
        for channels in [slice(None), *range(3 if octave <= _COLOUR_OCTAVE else 0)]:
            waves = rng.normal(0, _CONTRAST / octave**0.75, (octave, octave)).astype(np.float32)
            wide = np.asarray(Image.fromarray(waves).resize((width, height), Image.Resampling.BICUBIC))
            pixels[..., channels] += wide[..., None] if channels == slice(None) else wide
    for _ in range(_SHAPES):
        left, top = rng.integers(0, width), rng.integers(0, height)
        right, bottom = left + rng.integers(20, width // 2), top + rng.integers(20, height // 2)
        pixels[top:bottom, left:right] = 0.5 * pixels[top:bottom, left:right] + rng.normal(0, 30, 3)
    pixels += rng.normal(0, 2.0, (height, width, 1)).astype(np.float32)  # the sensor
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels + 120, 0, 255).astype(np.uint8)).save(buffer, "jpeg", quality=_QUALITY)
    return buffer.getvalue()


def draw_photos(folder: Path, num_images: int) -> int:
    """Writes images as `0.jpg` and so on; returns their mean size in bytes."""
    folder.mkdir()
    with ProcessPoolExecutor() as processes:
        for number, content in enumerate(processes.map(draw_photo, range(num_images), chunksize=8)):
            (folder / f"{number}.jpg").write_bytes(content)
    return sum(path.stat().st_size for path in folder.iterdir()) // num_images
