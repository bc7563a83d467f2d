"""The model card's plot: distance from real images against agreement with the prompts, over guidance scales."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from sdtrain.dataset.files import publish

_COLORS = ("#1f7a5c", "#d1495b", "#3066be", "#edae49", "#6d597a", "#2b9eb3", "#7f5539", "#5c677d")
_INK, _PALE = "#24292f", "#e6eaee"


@dataclass(frozen=True)
class Axis:
    """A number on an axis: its column, and what is written beside it."""

    column: str
    label: str


def draw_curve(rows: Sequence[Mapping[str, Any]], x: Axis, y: Axis, footnote: str, path: Path) -> None:
    """One line a model, a point a guidance scale with its number beside it, thin bars for 95 % intervals.

    Args:
        rows: with `model`, `guidance_scale`, both columns, and `COLUMN_ci95` where it is known; in order of scale.
        x: agreement.
        y: distance.
        footnote: the protocol in a sentence or two.
        path: the PNG to write.
    """
    figure, axes = plt.subplots(figsize=(8.0, 5.4), dpi=140)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.grid(color=_PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=9)
    labels = list(dict.fromkeys(row["model"] for row in rows))
    for number, label in enumerate(labels):
        _draw_line(axes, [row for row in rows if row["model"] == label], x, y, _COLORS[number % len(_COLORS)])
    axes.set_xlabel(f"{x.label}, higher is better", fontsize=10, color=_INK)
    axes.set_ylabel(f"{y.label}, lower is better", fontsize=10, color=_INK)
    axes.margins(x=0.08, y=0.12)
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))  # no distance is below 0, though an interval around it may be
    axes.legend(frameon=False, fontsize=9, loc="best")
    figure.text(0.012, 0.012, textwrap.fill(footnote, 150), fontsize=6.5, color="#57606a", va="bottom", ha="left")
    figure.tight_layout(rect=(0, 0.075, 1, 1))
    with publish(path) as temporary:
        # Without the software tag the same numbers give the same bytes.
        figure.savefig(temporary, format="png", metadata={"Software": None})
    plt.close(figure)


def _draw_line(axes: Axes, rows: Sequence[Mapping[str, Any]], x: Axis, y: Axis, color: str) -> None:
    xs, ys = ([row[axis.column] for row in rows] for axis in (x, y))
    x_error, y_error = ([row.get(f"{axis.column}_ci95") or 0 for row in rows] for axis in (x, y))
    axes.errorbar(xs, ys, xerr=x_error, yerr=y_error, fmt="none", ecolor=color, elinewidth=0.8, alpha=0.35)
    axes.plot(xs, ys, color=color, linewidth=2, marker="o", markersize=5.5, label=rows[0]["model"])
    for number, (row, across, up) in enumerate(zip(rows, xs, ys, strict=True)):
        rises = number + 1 < len(ys) and ys[number + 1] > up
        axes.annotate(
            f"{row['guidance_scale']:g}",
            (across, up),
            xytext=(7, -11) if rises else (6, 5),  # off the line
            textcoords="offset points",
            fontsize=8.5,
            color=color,
            weight="bold",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
