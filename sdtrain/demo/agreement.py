"""Samples all colour-shape prompts and counts how often the checker agrees."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdtrain.config import load_config
from sdtrain.dataset.files import publish
from sdtrain.demo.checker import Agreement, agreement
from sdtrain.demo.images import COLORS, SHAPES, UNSEEN_PAIRS
from sdtrain.formats.export import write_pipeline
from sdtrain.models.unet import build_unet
from sdtrain.sampling.sampler import Sampler, SampleSettings, load_networks

PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
# One per seed, so that the metrics cover the scales in common use.
GUIDANCE_SCALES = (3.0, 4.5, 6.0, 8.0)
_TILE_PX, _MARGIN_PX, _SEEDS_IN_SHEET = 96, 64, 2


@dataclass(frozen=True)
class Trial:
    """A model's samples, per scale in the order of `PAIRS`, and their agreement by pairs in or not in training."""

    rounds: list[list[Image.Image]]
    seen: Agreement
    unseen: Agreement


def try_model(folder: Path, guidance_scales: Sequence[float] = GUIDANCE_SCALES, num_steps: int = 50) -> Trial:
    """Samples every pair once per scale, with new seeds each, from a diffusers folder by PLMS; checks the images."""
    sampler = Sampler(load_networks(folder))
    prompts = [f"a {color} {shape}" for color, shape in PAIRS]
    rounds = []
    for i, scale in enumerate(guidance_scales):
        settings = SampleSettings(scale, num_steps, batch_size=len(PAIRS))
        rounds.append(sampler.sample(prompts, range(1000 * i, 1000 * i + len(PAIRS)), settings))
    return Trial(rounds, _agreement(rounds, unseen=False), _agreement(rounds, unseen=True))


def export_untrained(config_name: str, output: Path) -> Path:
    """Exports a pipeline with the config's UNet before the first step."""
    config = load_config(config_name)
    return write_pipeline(build_unet(config.unet, config.latent_size), config, output)


def draw_sheet(trial: Trial) -> Image.Image:
    """Draws a sheet with a row per colour and a column per shape; unseen pairs have a red frame."""
    seeds = min(_SEEDS_IN_SHEET, len(trial.rounds))
    column_px, row_px = seeds * _TILE_PX + 8, _TILE_PX + 8
    sheet = Image.new("RGB", (_MARGIN_PX + len(SHAPES) * column_px, 28 + len(COLORS) * row_px), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, shape in enumerate(SHAPES):
        pen.text((_MARGIN_PX + column * column_px + 4, 6), shape, fill="black", font=font)
    for row, color in enumerate(COLORS):
        pen.text((4, 28 + row * row_px + _TILE_PX // 2), color, fill="black", font=font)
    for place, pair in enumerate(PAIRS):
        row, column = divmod(place, len(SHAPES))
        left, top = _MARGIN_PX + column * column_px, 28 + row * row_px
        for i in range(seeds):
            tile = trial.rounds[i][place].resize((_TILE_PX, _TILE_PX), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left + i * _TILE_PX, top))
        if pair in UNSEEN_PAIRS:
            pen.rectangle((left - 3, top - 3, left + seeds * _TILE_PX + 2, top + _TILE_PX + 2), outline="red", width=3)
    return sheet


def read_results(path: Path, checkpoint: str) -> dict[str, Agreement] | None:
    """Reads saved verdicts for the same checkpoint, by name; None if there are none."""
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    if content.pop("checkpoint") != checkpoint:
        return None
    return {name: Agreement(**values) for name, values in content.items()}


def write_results(path: Path, checkpoint: str, results: dict[str, Agreement]) -> None:
    """Saves the verdicts with their checkpoint."""
    content = {"checkpoint": checkpoint} | {name: vars(result) for name, result in results.items()}
    with publish(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def _agreement(rounds: list[list[Image.Image]], unseen: bool) -> Agreement:
    pairs = [(p, pair) for images in rounds for p, pair in zip(images, PAIRS, strict=True)]
    chosen = [(p, pair) for p, pair in pairs if (pair in UNSEEN_PAIRS) == unseen]
    return agreement([p for p, _ in chosen], [pair for _, pair in chosen])
