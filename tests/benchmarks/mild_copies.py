"""Copies that people make of photographs without a thought: cropped a little, brighter, smaller, with a logo.

    python -m tests.benchmarks.mild_copies

Each kind is a search of its own: 84 photographs and views of them, and one copy each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from sdtrain.demo.images import watermark
from tests.benchmarks.duplicate_quality import ALTERED_CONFIG, CONFIG, described_images, find_planted
from tests.benchmarks.planted import CHANGES, base_images, stored

Change = Callable[[Image.Image], Image.Image]


def main() -> None:
    images = base_images(0)
    described = described_images(images, 0)
    copies = {kind: described_images([make(image) for image in images], len(images)) for kind, make in KINDS.items()}
    for config in (CONFIG, ALTERED_CONFIG):
        find_planted(described, copies, config)


def _cropped(share: float, is_mirrored: bool = False) -> Change:
    def crop(image: Image.Image) -> Image.Image:
        aside, above = image.width * share / 2, image.height * share / 2
        image = image.crop((round(aside), round(above), image.width - round(aside), image.height - round(above)))
        return stored(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_mirrored else image)

    return crop


def _cropped_at_a_corner(share: float) -> Change:
    def crop(image: Image.Image) -> Image.Image:
        width, height = (side - round(side * share) for side in image.size)
        return stored(image.crop((0, 0, width, height)))

    return crop


def _resized(scale: float) -> Change:
    return lambda image: stored(_scaled(image, scale))


def _scaled(image: Image.Image, scale: float) -> Image.Image:
    width, height = (round(side * scale) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _toned(curve: Callable[[int], float]) -> Change:
    levels = [int(np.clip(round(curve(level)), 0, 255)) for level in range(256)]
    return lambda image: stored(image.point(levels * 3))


def _brighter(percent: int) -> Change:
    return _toned(lambda level: level * (1 + percent / 100))


def _contrasted(scale: float) -> Change:
    return _toned(lambda level: (level - 128) * scale + 128)


def _gamma(exponent: float) -> Change:
    return _toned(lambda level: 255 * (level / 255) ** exponent)


def _with_small_text(image: Image.Image) -> Image.Image:
    image = image.copy()
    place = (8, image.height - 24)
    ImageDraw.Draw(image).text(place, "(c) photo agency 2019", "white", ImageFont.load_default(14))
    return stored(image)


def _with_logo(image: Image.Image) -> Image.Image:
    image = image.copy()
    pen, (width, height), side = ImageDraw.Draw(image), image.size, min(image.size) // 6
    pen.ellipse((width - side - 8, height - side - 8, width - 8, height - 8), fill=(230, 230, 230))
    pen.text((width - side, height - side), "ab", (20, 20, 60), ImageFont.load_default(side // 2))
    return stored(image)


def _with_dark_logo(image: Image.Image) -> Image.Image:
    image = image.copy()
    (width, height), side = image.size, min(image.size) // 6
    box = (width - side - 8, height - side // 2 - 8, width - 8, height - 8)
    ImageDraw.Draw(image).rectangle(box, fill=(25, 25, 60))
    return stored(image)


def _with_large_mark(image: Image.Image) -> Image.Image:
    mark = Image.new("RGBA", image.size, (0, 0, 0, 0))
    pen, (width, height), veil = ImageDraw.Draw(mark), image.size, (255, 255, 255, 90)
    pen.text((width // 2, height // 2), "STOCK", veil, ImageFont.load_default(width // 4), "mm")
    for line in ((0, 0, width, height), (0, height, width, 0)):
        pen.line(line, veil, max(2, width // 60))
    return stored(Image.alpha_composite(image.convert("RGBA"), mark).convert("RGB"))


KINDS: dict[str, Change] = {
    **{f"cropped by {percent} %": _cropped(percent / 100) for percent in (1, 2, 3, 5, 10)},
    **{f"corner cropped by {percent} %": _cropped_at_a_corner(percent / 100) for percent in (2, 5)},
    **{f"resized x {scale}": _resized(scale) for scale in (0.35, 0.5, 0.6)},
    **{f"brighter by {percent} %": _brighter(percent) for percent in (8, -8, 15, -15)},
    **{f"{added:+d} levels": _toned(lambda level, added=added: level + added) for added in (15, -15)},
    **{f"contrast x {scale}": _contrasted(scale) for scale in (0.85, 1.15)},
    **{f"gamma {exponent}": _gamma(exponent) for exponent in (0.85, 1.15)},
    "colours x 1.3": lambda image: stored(ImageEnhance.Color(image).enhance(1.3)),
    "JPEG 30": lambda image: stored(image, 30),
    "JPEG 50": lambda image: stored(image, 50),
    "blurred by 1 px": lambda image: stored(image.filter(ImageFilter.GaussianBlur(1))),
    "sharpened": lambda image: stored(image.filter(ImageFilter.UnsharpMask(2, 100, 2))),
    "watermarked": lambda image: stored(watermark(image)),
    "watermarked, x 0.6, JPEG 50": lambda image: stored(_scaled(watermark(image), 0.6), 50),
    "text in a corner": _with_small_text,
    "logo of two colours": _with_logo,
    "dark logo": _with_dark_logo,
    "large half-transparent mark": _with_large_mark,
    "mirrored": CHANGES["mirrored"],
    "mirrored, cropped by 2 %": _cropped(0.02, is_mirrored=True),
    "mirrored, cropped by 5 %": _cropped(0.05, is_mirrored=True),
}

if __name__ == "__main__":
    main()
