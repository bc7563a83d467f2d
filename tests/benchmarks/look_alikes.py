"""Different images that look alike, by kind: of one template, in one frame, on one background, of one scene."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"
_NUM_TEMPLATES = 6
_SIDE = 300
_WORDS = ["the", "of", "image", "data", "model", "training", "result", "quarter", "revenue", "plan", "market", "agenda"]

Color = tuple[int, ...]


def hard_negatives(num: int = 120) -> dict[str, list[Image.Image]]:
    """`num` images of each kind, all of them different; views of one photograph only where ../shared/data is."""
    rng = np.random.default_rng(5)
    found = {kind: [draw(rng, i) for i in range(num)] for kind, draw in KINDS.items()}
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("kodak_*.png"))]
    views = [_view(photo, left) for photo in photos for left in (0, 0.12, 0.24)]
    return found | ({"views of one scene": views} if views else {})


def _slide(rng: np.random.Generator, number: int) -> Image.Image:
    """One of six templates, a title and some lines."""
    paper, ink = [((255, 255, 255), 20), ((20, 40, 90), 240), ((245, 240, 225), 20)][number % 3]
    image = Image.new("RGB", (400, 300), paper)
    pen = ImageDraw.Draw(image)
    if number % 6 >= 3:
        pen.rectangle((0, 0, 400, 40), fill=(180, 30, 30))
    pen.text((20, 12), _text(rng, 3).title(), (ink,) * 3, ImageFont.load_default(24))
    for line in range(int(rng.integers(3, 7))):
        pen.text((30, 60 + line * 36), f"- {_text(rng, int(rng.integers(2, 6)))}", (ink,) * 3, _font(16))
    return image


def _illustrated_slide(rng: np.random.Generator, number: int) -> Image.Image:
    """A template with a picture beside the lines."""
    image = Image.new("RGB", (400, 300), (250, 250, 248))
    image.paste(texture(900 + number % _NUM_TEMPLATES).resize((150, 300)), (250, 0))
    pen = ImageDraw.Draw(image)
    pen.text((16, 14), _text(rng, 2).title(), (30, 60, 120), _font(22))
    for line in range(int(rng.integers(3, 8))):
        pen.text((20, 60 + line * 28), f"- {_text(rng, int(rng.integers(1, 4)))}", (40, 40, 40), _font(15))
    return image


def _page(rng: np.random.Generator, _: int) -> Image.Image:
    image = Image.new("RGB", (300, 400), (250, 250, 250))
    for line in range(26):
        text = _text(rng, 9)[: int(rng.integers(12, 46))]
        ImageDraw.Draw(image).text((20, 12 + line * 14), text, (30, 30, 30), _font(11))
    return image


def _form(rng: np.random.Generator, number: int) -> Image.Image:
    """Labels and boxes of a template, most of them filled in."""
    layout = np.random.default_rng(200 + number % _NUM_TEMPLATES)
    image = Image.new("RGB", (300, 400), (252, 252, 250))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, 300, 34), fill=tuple(layout.integers(30, 200, 3).tolist()))
    pen.text((12, 8), _text(layout, 3).upper(), (255, 255, 255), _font(16))
    for row in range(11):
        top, left = 46 + row * 31, int(layout.integers(80, 130))
        pen.text((10, top + 4), _text(layout, 1), (60, 60, 60), _font(12))
        pen.rectangle((left, top, 290, top + 22), outline=(90, 90, 90))
        if rng.random() < 0.8:
            pen.text((left + 6, top + 4), _text(rng, int(rng.integers(1, 4))), (20, 20, 120), _font(13))
    return image


def _certificate(rng: np.random.Generator, number: int) -> Image.Image:
    """A frame and a text of a template, with another name and date."""
    layout = np.random.default_rng(300 + number % _NUM_TEMPLATES)
    edge = tuple(layout.integers(40, 180, 3).tolist())
    image = Image.new("RGB", (400, 300), (250, 246, 230))
    pen = ImageDraw.Draw(image)
    for inset in (8, 14, 18):
        pen.rectangle((inset, inset, 400 - inset, 300 - inset), outline=edge, width=3)
    pen.text((70, 50), _text(layout, 2).title(), edge, _font(32))
    pen.text((80, 220), _text(layout, 6), (60, 60, 60), _font(13))
    pen.ellipse((300, 220, 350, 270), fill=edge)
    pen.text((110, 120), _text(rng, int(rng.integers(2, 4))).title(), (20, 20, 20), _font(26))
    pen.text((80, 180), _text(rng, int(rng.integers(2, 5))), (20, 20, 20), _font(14))
    return image


def _screenshot(rng: np.random.Generator, number: int) -> Image.Image:
    """A window's bars and list, light or dark, with other entries."""
    layout = np.random.default_rng(400 + number % _NUM_TEMPLATES)
    paper, ink, bar = [((255,) * 3, (30,) * 3, (225, 228, 232)), ((30, 32, 38), (220,) * 3, (50, 54, 62))][number % 2]
    image = Image.new("RGB", (400, 280), paper)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, 400, 26), fill=bar)
    pen.rectangle((0, 26, 90, 280), fill=tuple((np.add(bar, paper) // 2).tolist()))
    for row in range(8):
        pen.text((8, 34 + row * 28), _text(layout, 1), ink, _font(12))
    for row in range(int(rng.integers(4, 9))):
        pen.ellipse((102, 38 + row * 28, 118, 54 + row * 28), fill=tuple(rng.integers(0, 256, 3).tolist()))
        pen.text((126, 38 + row * 28), _text(rng, int(rng.integers(2, 6))), ink, _font(13))
    return image


def _chart(rng: np.random.Generator, number: int) -> Image.Image:
    """Bars, or curves, of other values in the same axes."""
    image = Image.new("RGB", (400, 300), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    for level in range(6):
        pen.line((40, 40 + level * 44, 380, 40 + level * 44), (215, 215, 215))
    pen.line((40, 30, 40, 260, 380, 260), (60, 60, 60), 2)
    color = [(31, 119, 180), (255, 127, 14), (44, 160, 44)][number % 3]
    if number % _NUM_TEMPLATES < 3:
        for bar, value in enumerate(rng.uniform(20, 210, 8)):
            pen.rectangle((52 + bar * 40, 260 - value, 80 + bar * 40, 260), fill=color)
    else:
        values = 150 + np.cumsum(rng.normal(0, 14, 40))
        pen.line([(42 + 8.6 * i, float(np.clip(v, 35, 258))) for i, v in enumerate(values)], color, 3)
    return image


def _map(rng: np.random.Generator, _: int) -> Image.Image:
    """Streets, a park and water in the colours of one map."""
    image = Image.new("RGB", (256, 256), (242, 239, 233))
    pen = ImageDraw.Draw(image)
    for color in ((170, 211, 223), (200, 230, 180)):
        center, size = rng.uniform(0, 256, 2), rng.uniform(20, 80, 2)
        pen.ellipse((*(center - size).tolist(), *(center + size).tolist()), fill=color)
    for width, color, num in ((3, (255, 255, 255), 14), (7, (250, 220, 150), 3)):
        for _street in range(num):
            start, angle = rng.uniform(0, 256, 2), rng.choice([0, np.pi / 2]) + rng.normal(0, 0.2)
            reach = 400 * np.array([np.cos(angle), np.sin(angle)])
            pen.line((*(start - reach).tolist(), *(start + reach).tolist()), color, width)
    return image


def _meme(rng: np.random.Generator, number: int) -> Image.Image:
    """One picture with other texts."""
    image = _picture(number % _NUM_TEMPLATES).resize((_SIDE, _SIDE))
    pen = ImageDraw.Draw(image)
    for top in (12, 230) if number % 2 else (228,):
        for line in range(int(rng.integers(1, 3))):
            words = _text(rng, int(rng.integers(2, 4))).upper()
            pen.text((150, top + 28 * line), words, "white", _font(26), "mt", stroke_width=2, stroke_fill="black")
    return image


def _icon(rng: np.random.Generator, number: int) -> Image.Image:
    """A glyph on a rounded square or a disc."""
    image = Image.new("RGB", (256, 256), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    color = [(52, 120, 246), (235, 80, 60), (60, 60, 60)][number % 3]
    if number % _NUM_TEMPLATES < 3:
        pen.rounded_rectangle((24, 24, 232, 232), 44, fill=color)
    else:
        pen.ellipse((24, 24, 232, 232), fill=color)
    corners = 128 + rng.uniform(30, 72, 6)[:, None] * np.array(
        [[np.cos(a), np.sin(a)] for a in np.linspace(0, 2 * np.pi, 7)[:6] + rng.uniform(0, 1)]
    )
    pen.polygon([tuple(corner) for corner in corners.tolist()], fill=(255, 255, 255))
    if rng.random() < 0.5:
        at = rng.uniform(90, 166, 2)
        pen.ellipse((*(at - 18).tolist(), *(at + 18).tolist()), fill=color)
    return image


def _product(rng: np.random.Generator, number: int) -> Image.Image:
    """An object in the middle of white."""
    image = Image.new("RGB", (300, 300), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    across, down = rng.uniform(60, 126, 2)
    box = (150 - across, 150 - down, 150 + across, 150 + down)
    (pen.ellipse if number % 2 else pen.rectangle)(box, fill=tuple(rng.integers(30, 220, 3).tolist()))
    return image


def _bottle(rng: np.random.Generator, number: int) -> Image.Image:
    """A bottle of one of six shapes, shaded, with another label and sometimes another colour."""
    shape = np.random.default_rng(500 + number % _NUM_TEMPLATES)
    width, neck, shoulder = shape.uniform(44, 80), shape.uniform(16, 28), shape.uniform(70, 120)
    down = np.arange(_SIDE)[:, None]
    half = np.where(down < shoulder, neck, width) * ((down > 20) & (down < 280))
    away = (np.arange(_SIDE)[None, :] - 150) / np.maximum(half, 1)
    inside = np.abs(away) < 1
    color = (shape if rng.random() < 0.7 else rng).uniform(60, 230, 3)
    shaded = color * (0.55 + 0.45 * np.sqrt(np.clip(1 - away**2, 0, 1)))[..., None]
    image = _image(np.where(inside[..., None], shaded, 255))
    pen = ImageDraw.Draw(image)
    pen.rectangle((150 - width, 170, 150 + width, 240), fill=(245, 240, 228))
    pen.text((150, 180), _text(rng, 1).title(), (40, 40, 40), _font(22), "mt")
    pen.text((150, 212), _text(rng, 2), (90, 60, 60), _font(13), "mt")
    return image


def _face(rng: np.random.Generator, number: int) -> Image.Image:
    """A head and shoulders before one of six studio backgrounds."""
    backdrop = np.random.default_rng(600 + number % _NUM_TEMPLATES)
    tone, light = backdrop.uniform(90, 210, 3), np.hypot(*np.meshgrid(np.linspace(-1, 1, 256), np.linspace(-1, 1, 256)))
    image = _image(tone * (1.1 - 0.35 * light[..., None]))
    pen = ImageDraw.Draw(image)
    skin, hair, shirt = (
        rng.uniform(0.5, 1) * np.array([235, 195, 170]),
        rng.uniform(20, 160, 3),
        rng.uniform(20, 230, 3),
    )
    x, y = 128 + rng.normal(0, 4, 2) - (0, 18)
    wide, high = rng.normal(46, 4), rng.normal(60, 4)

    def oval(cx: float, cy: float, rx: float, ry: float, color: np.ndarray) -> None:
        pen.ellipse((cx - rx, cy - ry, cx + rx, cy + ry), fill=tuple(int(c) for c in color))

    oval(x, 270, wide * 2, 90, shirt)
    oval(x, y - 14, wide * rng.uniform(1.05, 1.3), high * rng.uniform(1.0, 1.2), hair)
    pen.rectangle((x - 18, y + 30, x + 18, y + 84), fill=tuple(int(c) for c in skin * 0.85))
    oval(x, y, wide, high, skin)
    for side in (-1, 1):
        oval(x + side * rng.normal(18, 2), y - rng.normal(8, 2), 7, 4, np.array([250, 250, 250]))
        oval(x + side * rng.normal(18, 2), y - rng.normal(8, 2), 3, 3, np.array([40, 30, 20]))
    oval(x, y + rng.normal(32, 3), rng.normal(14, 3), rng.uniform(2, 6), skin * 0.6)
    return image.resize((300, 300), Image.Resampling.BICUBIC)


def _frame(rng: np.random.Generator, number: int) -> Image.Image:
    """What a fixed camera saw: something moved before one scene, and the light and the noise are others."""
    scene = number % _NUM_TEMPLATES
    image = _picture(scene).resize((320, 256))
    moving = texture(700 + scene).resize((70, 110))
    mask = Image.new("L", moving.size)
    ImageDraw.Draw(mask).ellipse((0, 0, 70, 110), fill=255)
    image.paste(moving, (int(rng.integers(0, 250)), int(rng.integers(90, 140))), mask)
    return _image(np.asarray(image) * rng.uniform(0.96, 1.04) + rng.normal(0, 2, (256, 320, 3)))


def _blank(rng: np.random.Generator, number: int) -> Image.Image:
    """One colour, or a gradient down or across, with a little noise."""
    along = np.linspace(0, 1, 256)
    share = (np.zeros((1, 1)), along[:, None], along[None, :])[number % 3][..., None]
    pixels = rng.integers(0, 256, 3) * (1 - share) + rng.integers(0, 256, 3) * share
    return _image(pixels + rng.normal(0, 1.5, (256, 256, 3)))


def _landscape(rng: np.random.Generator, _: int) -> Image.Image:
    """Sky above ground."""
    down = np.linspace(0, 1, 256)[:, None, None]
    sky, ground = rng.normal((120, 160, 220), 15), rng.normal((80, 120, 60), 20)
    pixels = np.where(down < rng.uniform(0.4, 0.6), sky + 60 * down, ground - 30 * down)
    waves = Image.fromarray(rng.normal(0, 14, (32, 32)).astype(np.float32))
    return _image(pixels + np.asarray(waves.resize((256, 256), Image.Resampling.BICUBIC))[..., None])


def _view(photo: Image.Image, left: float) -> Image.Image:
    """Six tenths of a photograph's width, as a camera sees it that turns."""
    return photo.crop((round(photo.width * left), 0, round(photo.width * (left + 0.6)), photo.height))


KINDS: dict[str, Callable[[np.random.Generator, int], Image.Image]] = {
    "slides": _slide,
    "pages of text": _page,
    "blank": _blank,
    "products": _product,
    "landscapes": _landscape,
    "illustrated slides": _illustrated_slide,
    "forms": _form,
    "certificates": _certificate,
    "screenshots": _screenshot,
    "charts": _chart,
    "map tiles": _map,
    "memes of one picture": _meme,
    "icons": _icon,
    "bottles": _bottle,
    "faces in one studio": _face,
    "frames of one scene": _frame,
}


def _text(rng: np.random.Generator, num_words: int) -> str:
    return " ".join(rng.choice(_WORDS, num_words))


@lru_cache
def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)


@lru_cache
def _picture(number: int) -> Image.Image:
    """A photograph where ../shared/data is, else shades like those of one."""
    photos = sorted(PHOTOS.glob("kodak_*.png"))
    return Image.open(photos[number]).convert("RGB") if photos else texture(number)


@lru_cache
def texture(seed: int) -> Image.Image:
    """Soft shades with detail at every size, as photographs have."""
    rng = np.random.default_rng(seed)
    pixels = np.full((256, 256, 3), 120.0)
    for octave in (2, 4, 8, 16, 32, 64):
        for channel in range(3):
            waves = rng.normal(0, (45 if channel == 0 else 20) / octave**0.75, (octave, octave)).astype(np.float32)
            wide = np.asarray(Image.fromarray(waves).resize((256, 256), Image.Resampling.BICUBIC))
            pixels[..., [channel] if channel else [0, 1, 2]] += wide[..., None]
    return _image(pixels)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
