"""The report's diagrams, drawn with matplotlib into PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

KEPT, DROPPED, MUTED, INK = "#1f7a5c", "#d1495b", "#c9d1d9", "#24292f"
_GROUPS = (MUTED, KEPT, DROPPED, "#3066be", "#edae49")


def plot_funnel(rows: Sequence[tuple[str, int, int]], path: Path) -> None:
    """Bars of what remains after each rule; rows are (label, dropped, remaining) in order of the rules."""
    figure, axes = _canvas(9.0, 0.32 * len(rows) + 0.9)
    positions = np.arange(len(rows))
    dropped = np.array([row[1] for row in rows])
    remaining = np.array([row[2] for row in rows])
    axes.barh(positions, remaining, color=KEPT, height=0.72)
    axes.barh(positions, dropped, left=remaining, color=DROPPED, height=0.72)
    for y, (_, lost, left) in enumerate(rows):
        axes.text(left + lost, y, f"  -{lost:,}" if lost else "", va="center", color=DROPPED, fontsize=8)
        axes.text(remaining.max() * 0.01, y, f"{left:,}", va="center", color="white", fontsize=8)
    axes.set_yticks(positions, [row[0] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, (remaining + dropped).max() * 1.1)
    axes.set_xlabel("rows that remain (green) and rows that the rule removes (red)")
    _save(figure, path)


def plot_histogram(
    groups: Mapping[str, Sequence[float]], threshold: float | None, label: str, path: Path, of: str = "images"
) -> None:
    """Overlaid histograms of one score, the first group at the back; `threshold` is drawn as a line."""
    figure, axes = _canvas(4.6, 2.8)
    values = np.concatenate([np.asarray(v, dtype=float) for v in groups.values()] or [np.zeros(1)])
    edges = np.histogram_bin_edges(values, bins=40).tolist()
    for (name, group), color in zip(groups.items(), _GROUPS, strict=False):
        axes.hist(np.asarray(group, dtype=float), bins=edges, color=color, alpha=0.9, label=f"{name} ({len(group):,})")
    if threshold is not None:
        axes.axvline(threshold, color=DROPPED, linewidth=1.5, linestyle="--", label=f"limit {threshold:g}")
    axes.set_xlabel(label)
    axes.set_ylabel(of)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def plot_pairs(pairs: Sequence[tuple[float, float]], limit: float | None, label: str, path: Path) -> None:
    """Plots (metadata's, our) scores, one point per image, with `limit` on both axes; they agree on the gray line."""
    figure, axes = _canvas(4.6, 4.0)
    metadata, ours = np.asarray(pairs, dtype=float).reshape(-1, 2).T
    ends = [min(metadata.min(), ours.min()), max(metadata.max(), ours.max())] if len(pairs) else [0.0, 1.0]
    axes.plot(ends, ends, color=MUTED, linewidth=1)
    axes.scatter(metadata, ours, s=4, color=KEPT, alpha=0.35, linewidths=0)
    if limit is not None:
        for draw in (axes.axvline, axes.axhline):
            draw(limit, color=DROPPED, linewidth=1, linestyle="--")
    axes.set_xlabel(f"{label}, in the metadata")
    axes.set_ylabel("ours", fontsize=8)
    _save(figure, path)


def plot_loss(losses: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]], path: Path) -> None:
    """Training loss against the optimizer step, with its running mean over 5 % of the run, and the validation loss.

    Both are (step, loss); an empty `validation` draws no curve.
    """
    figure, axes = _canvas(9.0, 3.0)
    steps, values = [step for step, _ in losses], [loss for _, loss in losses]
    axes.plot(steps, values, color=MUTED, linewidth=0.8, label="training")
    width = max(1, len(values) // 20)
    if len(values) > width:
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color=KEPT, linewidth=2, label=f"mean of {width} points")
    if validation:
        axes.plot(
            *zip(*validation, strict=True), color=DROPPED, linewidth=2, marker="o", markersize=4, label="held out"
        )
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean squared error of the noise")
    axes.legend(frameon=False)
    _save(figure, path)


def plot_timesteps(curves: Mapping[int, Mapping[int, float]], path: Path) -> None:
    """Validation loss by timestep from {optimizer step: {timestep: loss}}; later steps are darker."""
    figure, axes = _canvas(9.0, 2.8)
    for i, (step, losses) in enumerate(curves.items(), 1):
        label, darkness = f"step {step:,}", i / len(curves)
        axes.plot(*zip(*losses.items(), strict=True), color=KEPT, alpha=darkness, marker="o", markersize=4, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("timestep: little noise on the left, only noise on the right")
    axes.set_ylabel("error on held-out samples")
    axes.legend(frameon=False)
    _save(figure, path)


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), dpi=130)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.label.set_fontsize(8)
    axes.yaxis.label.set_fontsize(8)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    # Without the software tag the same data gives the same bytes.
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
