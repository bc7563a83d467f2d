"""Images with planted copies: which changes the perceptual level sees through."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sdtrain.demo.images import SEEN_PAIRS, draw, random_scene, watermark

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"
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


def hard_negatives(num: int = 120) -> dict[str, list[Image.Image]]:
    """Different images that look alike, by kind; views of one photograph only where ../shared/data is."""
    rng = np.random.default_rng(5)
    drawn = {"slides": _slide, "pages of text": _page, "blank": _blank, "products": _product, "landscapes": _landscape}
    found = {kind: [draw(rng, i) for i in range(num)] for kind, draw in drawn.items()}
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("kodak_*.png"))]
    views = [_view(photo, left) for photo in photos for left in (0, 0.12, 0.24)]
    return found | ({"views of one scene": views} if views else {})


_WORDS = ["the", "of", "image", "data", "model", "training", "result", "quarter", "revenue", "plan", "market", "agenda"]


def _slide(rng: np.random.Generator, number: int) -> Image.Image:
    """One of six templates, a title and some lines."""
    paper, ink = [((255, 255, 255), 20), ((20, 40, 90), 240), ((245, 240, 225), 20)][number % 3]
    image = Image.new("RGB", (400, 300), paper)
    pen = ImageDraw.Draw(image)
    if number % 6 >= 3:
        pen.rectangle((0, 0, 400, 40), fill=(180, 30, 30))
    pen.text((20, 12), " ".join(rng.choice(_WORDS, 3)).title(), (ink,) * 3, ImageFont.load_default(24))
    for line in range(int(rng.integers(3, 7))):
        text = "- " + " ".join(rng.choice(_WORDS, int(rng.integers(2, 6))))
        pen.text((30, 60 + line * 36), text, (ink,) * 3, ImageFont.load_default(16))
    return image


def _page(rng: np.random.Generator, _: int) -> Image.Image:
    image = Image.new("RGB", (300, 400), (250, 250, 250))
    for line in range(26):
        text = " ".join(rng.choice(_WORDS, 9))[: int(rng.integers(12, 46))]
        ImageDraw.Draw(image).text((20, 12 + line * 14), text, (30, 30, 30), ImageFont.load_default(11))
    return image


def _blank(rng: np.random.Generator, number: int) -> Image.Image:
    """One colour, or a gradient down or across, with a little noise."""
    along = np.linspace(0, 1, TILE_PX)
    share = (np.zeros((1, 1)), along[:, None], along[None, :])[number % 3][..., None]
    pixels = rng.integers(0, 256, 3) * (1 - share) + rng.integers(0, 256, 3) * share
    return _image(pixels + rng.normal(0, 1.5, (TILE_PX, TILE_PX, 3)))


def _product(rng: np.random.Generator, number: int) -> Image.Image:
    """An object in the middle of white."""
    image = Image.new("RGB", (300, 300), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    across, down = rng.uniform(60, 126, 2)
    box = (150 - across, 150 - down, 150 + across, 150 + down)
    (pen.ellipse if number % 2 else pen.rectangle)(box, fill=tuple(rng.integers(30, 220, 3).tolist()))
    return image


def _landscape(rng: np.random.Generator, _: int) -> Image.Image:
    """Sky above ground."""
    down = np.linspace(0, 1, TILE_PX)[:, None, None]
    sky, ground = rng.normal((120, 160, 220), 15), rng.normal((80, 120, 60), 20)
    pixels = np.where(down < rng.uniform(0.4, 0.6), sky + 60 * down, ground - 30 * down)
    waves = Image.fromarray(rng.normal(0, 14, (32, 32)).astype(np.float32))
    return _image(pixels + np.asarray(waves.resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC))[..., None])


def _view(photo: Image.Image, left: float) -> Image.Image:
    """Six tenths of a photograph's width, as a camera sees it that turns."""
    return photo.crop((round(photo.width * left), 0, round(photo.width * (left + 0.6)), photo.height))


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _stored(image: Image.Image, quality: int = 90) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=quality)
    return Image.open(buffer).convert("RGB")


def _resized(image: Image.Image) -> Image.Image:
    return _stored(image.resize((image.width * 3 // 5, image.height * 3 // 5), Image.Resampling.LANCZOS))


def _cropped(image: Image.Image) -> Image.Image:
    across, down = round(image.width * 0.025), round(image.height * 0.025)
    return _stored(image.crop((across, down, image.width - across, image.height - down)))


def _recoloured(image: Image.Image) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(i + 43) % 256 for i in range(256)])  # by 60 degrees
    return _stored(Image.merge("HSV", (turned, saturation, value)).convert("RGB"))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "resized x 0.6": _resized,
    "recompressed JPEG 50": lambda image: _stored(image, 50),
    "cropped 5 %": _cropped,
    "watermarked": lambda image: _stored(watermark(image)),
    "mirrored": lambda image: _stored(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "recoloured 60 degrees": _recoloured,
}
