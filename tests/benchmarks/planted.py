"""Pictures with planted copies: which changes the perceptual level sees through."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from sdtrain.demo.pictures import SEEN_PAIRS, draw, random_scene, watermark

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"
TILE_PX = 256


def base_pictures(num_scenes: int) -> list[Image.Image]:
    """Different pictures: scenes of the demo, and tiles of the photographs in ../shared/data where they are."""
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng, *SEEN_PAIRS[i % len(SEEN_PAIRS)]) for i in range(num_scenes)]
    pictures = [draw(scene, *rng.integers(256, 385, 2).tolist()) for scene in scenes]
    for path in sorted(PHOTOS.glob("kodak_*.png")):
        photo = Image.open(path).convert("RGB")
        pictures.append(photo)
        for top in range(0, photo.height - TILE_PX + 1, TILE_PX):
            pictures += [
                photo.crop((left, top, left + TILE_PX, top + TILE_PX))
                for left in range(0, photo.width - TILE_PX + 1, TILE_PX)
            ]
    return pictures


def _stored(picture: Image.Image, quality: int = 90) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=quality)
    return Image.open(buffer).convert("RGB")


def _resized(picture: Image.Image) -> Image.Image:
    return _stored(picture.resize((picture.width * 3 // 5, picture.height * 3 // 5), Image.Resampling.LANCZOS))


def _cropped(picture: Image.Image) -> Image.Image:
    across, down = round(picture.width * 0.025), round(picture.height * 0.025)
    return _stored(picture.crop((across, down, picture.width - across, picture.height - down)))


def _recoloured(picture: Image.Image) -> Image.Image:
    hue, saturation, value = picture.convert("HSV").split()
    turned = hue.point([(i + 43) % 256 for i in range(256)])  # by 60 degrees
    return _stored(Image.merge("HSV", (turned, saturation, value)).convert("RGB"))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "resized x 0.6": _resized,
    "recompressed JPEG 50": lambda picture: _stored(picture, 50),
    "cropped 5 %": _cropped,
    "watermarked": lambda picture: _stored(watermark(picture)),
    "mirrored": lambda picture: _stored(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "recoloured 60 degrees": _recoloured,
}
