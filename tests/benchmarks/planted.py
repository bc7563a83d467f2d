"""Images with planted copies: which changes the perceptual level sees through."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from sdtrain.demo.images import SEEN_PAIRS, draw, random_scene, watermark
from tests.benchmarks.look_alikes import PHOTOS

TILE_PX = 256


def base_images(num_scenes: int) -> list[Image.Image]:
    """Different images: scenes of the demo, and tiles of the photographs in ../shared/data where they are."""
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng, *SEEN_PAIRS[i % len(SEEN_PAIRS)]) for i in range(num_scenes)]
    images = [draw(scene, *rng.integers(256, 385, 2).tolist()) for scene in scenes]
    for path in sorted(PHOTOS.glob("kodak_*.png")):
        photo = Image.open(path).convert("RGB")
        images.append(photo)
        for top in range(0, photo.height - TILE_PX + 1, TILE_PX):
            images += [
                photo.crop((left, top, left + TILE_PX, top + TILE_PX))
                for left in range(0, photo.width - TILE_PX + 1, TILE_PX)
            ]
    return images


def stored(image: Image.Image, quality: int = 90) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=quality)
    return Image.open(buffer).convert("RGB")


def _resized(image: Image.Image) -> Image.Image:
    return stored(image.resize((image.width * 3 // 5, image.height * 3 // 5), Image.Resampling.LANCZOS))


def _cropped(image: Image.Image) -> Image.Image:
    across, down = round(image.width * 0.025), round(image.height * 0.025)
    return stored(image.crop((across, down, image.width - across, image.height - down)))


def _recoloured(image: Image.Image) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(i + 43) % 256 for i in range(256)])  # by 60 degrees
    return stored(Image.merge("HSV", (turned, saturation, value)).convert("RGB"))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "resized x 0.6": _resized,
    "recompressed JPEG 50": lambda image: stored(image, 50),
    "cropped 5 %": _cropped,
    "watermarked": lambda image: stored(watermark(image)),
    "mirrored": lambda image: stored(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "recoloured 60 degrees": _recoloured,
}
