"""The report's training section: curves, validation by timestep, previews."""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sdtrain.report.plots import plot_loss, plot_timesteps
from sdtrain.training.run_dir import RunDir

_MAX_PREVIEWS = 6
ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Training:
    """The section about one run: last metrics, plots (`by_timestep` if validated), previews as (image, step).

    Paths are relative to the page.
    """

    text: str
    curve: str
    by_timestep: str | None
    previews: list[tuple[str, int]]


def draw_training(run: RunDir, images: Path) -> Training | None:
    """Draws into the folder `images` beside the page; None if nothing is logged yet."""
    rows = run.log.rows()
    if not rows:
        return None
    validation = _validation(run)
    means = [(step, sum(losses.values()) / len(losses)) for step, losses in validation.items()]
    plot_loss([(int(row["step"]), float(row["loss"])) for row in rows], means, images / "loss.png")
    if validation:
        steps = _evenly(list(validation), 4)
        plot_timesteps({step: validation[step] for step in steps}, images / "timesteps.png")
    rate = sorted(float(row["images_per_s"]) for row in rows)[len(rows) // 2]
    held_out = f"; loss on held-out samples {means[-1][1]:.3f}" if means else ""
    return Training(
        text=f"{int(rows[-1]['step']):,} optimizer steps; last loss {float(rows[-1]['loss']):.3f}{held_out}; "
        f"{rate:,.0f} images/s.",
        curve="pictures/loss.png",
        by_timestep="pictures/timesteps.png" if validation else None,
        previews=_previews(run, images),
    )


def _validation(run: RunDir) -> dict[int, dict[int, float]]:
    """Step -> timestep -> loss of the averaged weights."""
    found: dict[int, dict[int, float]] = defaultdict(dict)
    for row in run.validation.rows():
        if row["weights"] == "ema":
            found[int(row["step"])][int(row["timestep"])] = float(row["loss"])
    return dict(found)


def _previews(run: RunDir, images: Path) -> list[tuple[str, int]]:
    shown = []
    for sheet in _evenly(sorted(run.previews.glob("step-*.png")), _MAX_PREVIEWS):
        shutil.copyfile(sheet, images / f"preview-{sheet.name}")
        shown.append((f"pictures/preview-{sheet.name}", int(sheet.stem.removeprefix("step-"))))
    return shown


def _evenly(items: list[ItemT], num: int) -> list[ItemT]:
    if len(items) <= num:
        return items
    return [items[round(i * (len(items) - 1) / (num - 1))] for i in range(num)]
