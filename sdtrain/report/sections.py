"""Sections of the report: a training run, and LAION's scores compared with ours."""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import duckdb

from sdtrain.report.plots import plot_loss, plot_pairs, plot_timesteps
from sdtrain.training.run_dir import RunDir

_MAX_PREVIEWS = 6
# More points would overlap.
MAX_POINTS = 5_000
_SCORES = (
    ("aesthetic", "min_aesthetic", "aesthetic score (V2)"),
    ("aesthetic_v1", "min_aesthetic_v1", "aesthetic score (V1)"),
    ("pwatermark", "max_watermark", "P(watermark)"),
    ("punsafe", "max_unsafe", "P(unsafe)"),
    ("similarity", "min_similarity", "similarity to the caption"),
)
_METRICS = ("num", "correlation", "difference", "same_side")
ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Training:
    """The section about one run: last metrics, plots (`by_timestep` if validated), previews as (image, step).

    Paths are relative to the page.
    """

    text: str
    numbers: list[tuple[str, str]]
    """The most important metrics as (value, name)."""
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
    loss = (f"{means[-1][1]:.3f}", "loss, held out") if means else (f"{float(rows[-1]['loss']):.3f}", "last loss")
    return Training(
        numbers=[(f"{int(rows[-1]['step']):,}", "optimizer steps"), loss],
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


def draw_pairs(connection: duckdb.DuckDBPyConnection, limits: dict[str, float], images: Path) -> list[dict[str, str]]:
    """Draws and describes each score that both have; older views have fewer, or none."""
    known = connection.execute("SELECT column_name FROM duckdb_columns() WHERE table_name = 'score_pairs'").fetchall()
    drawn = []
    for column, rule, label in _SCORES:
        if (f"{column}_metadata",) not in known:
            continue
        both = f"FROM score_pairs WHERE {column}_metadata IS NOT NULL AND {column}_image IS NOT NULL"
        limit = limits.get(rule)
        query = _comparison(column, both, limit)
        metrics = dict(zip(_METRICS, connection.execute(query).fetchall()[0], strict=True))
        if not metrics["num"]:
            continue
        pairs = connection.execute(
            f"SELECT {column}_metadata, {column}_image FROM (SELECT * {both}) "  # noqa: S608 - names are from here
            f"USING SAMPLE reservoir({MAX_POINTS} ROWS) REPEATABLE (1)"
        ).fetchall()
        plot_pairs(pairs, limit, label, images / f"{column}_pairs.png")
        text = _sentence(label, metrics, limit)
        drawn.append({"image": f"pictures/{column}_pairs.png", "text": text, "query": query})
    return drawn


def _comparison(column: str, both: str, limit: float | None) -> str:
    """The query of `_METRICS`, which the page shows too."""
    metadata, image = f"{column}_metadata", f"{column}_image"
    side = "NULL" if limit is None else f"avg((({metadata} > {limit!r}) = ({image} > {limit!r}))::INTEGER)"
    columns = ("count(*)", f"corr({metadata}, {image})", f"avg({image} - {metadata})", side)
    return f"SELECT {', '.join(f'{item} AS {name}' for item, name in zip(columns, _METRICS, strict=True))} {both}"


def _sentence(label: str, metrics: dict[str, Any], limit: float | None) -> str:
    text = f"{label}: {metrics['num']:,} images, ours {metrics['difference']:+.3g} on average"
    correlation = metrics["correlation"]
    if correlation is not None and math.isfinite(correlation):  # a single value has none
        text += f", correlation {correlation:.3f}"
    if limit is not None:
        text += f", {100 * metrics['same_side']:.1f} % on the same side of {limit:g}"
    return text + "."
