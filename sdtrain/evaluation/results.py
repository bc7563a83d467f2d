"""The results of an evaluation: results.json, results.csv, curve.png."""

from __future__ import annotations

import csv
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, field_validator

from sdtrain.dataset.files import publish
from sdtrain.errors import UserError
from sdtrain.evaluation.contamination import CLEAN, Contamination
from sdtrain.evaluation.layout import EvaluationDir, write_json
from sdtrain.settings import Settings, nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#1f7a5c", "#d1495b", "#3066be", "#edae49", "#6d597a", "#2b9eb3", "#7f5539", "#5c677d")
_INK, _PALE = "#24292f", "#e6eaee"


class Results(Settings):
    """The numbers of an evaluation with their protocol."""

    protocol: dict[str, Any]
    """Every setting, and digests of reference, prompts, networks and models."""
    metrics: dict[str, str]
    """Name -> description."""
    notes: list[str]
    rows: list[dict[str, Any]]
    """Per model and scale: `model`, `guidance_scale`, `num_images`, and each number with its spread."""
    skills: list[dict[str, Any]] = Field(default=[])
    """Prompt following by skill, and by the prompts' number of atoms, for every model and scale."""
    contamination: dict[str, Contamination] = Field(default={})
    """By model: which prompts and reference images are in its training data; without these, numbers end in `_clean`."""

    @field_validator("rows")
    @classmethod
    def _former_count(cls, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Reads `num_pictures`, as earlier versions called `num_images`."""
        former = {"num_pictures": "num_images"}
        return [{former.get(name, name): value for name, value in row.items()} for row in rows]

    @field_validator("protocol")
    @classmethod
    def _former_network(cls, protocol: dict[str, Any]) -> dict[str, Any]:
        """Reads `network` and its digest, of when there was one."""
        if "network" not in protocol:
            return protocol
        networks, digests = [protocol["network"]], {protocol["network"]: protocol["network_sha256"]}
        kept = {name: value for name, value in protocol.items() if name not in ("network", "network_sha256")}
        return kept | {"networks": networks, "networks_sha256": digests}

    def footnote(self) -> str:
        """The protocol in a few words, for the plot."""
        p = self.protocol
        networks = "; ".join(self._network(name, digest) for name, digest in p["networks_sha256"].items())
        drawn = f"{p['num_prompts']:,} images a point, {p['size_px']} px, {p['num_steps']} {p['sampler'].upper()} steps"
        return (
            f"{drawn}, {p['weights']} weights, seed {p['seed']}; prompts {p['prompts_source']}; "
            f"reference {p['reference_source']} (sha256 {p['reference_sha256'][:12]}); {networks}. "
            "Beside each point: its guidance scale; bars: 95 % intervals."
            + "".join(f" {model}: {found.sentence()}." for model, found in self.contamination.items())
        )

    def _network(self, name: str, digest: str) -> str:
        words = f"{name} ({self.protocol['resize']} resize)" if name == "inception" else name
        return f"network {words}, sha256 {digest[:12]}"


def read_results(path: Path) -> Results:
    """Reads results.json; UserError if it is missing or malformed."""
    try:
        return Results.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} holds no results of an evaluation. Run `sdtrain evaluate` for them.") from error


def write_results(directory: EvaluationDir, results: Results, x: Axis | None, y: Axis) -> None:
    """Writes all three files, results.json last; the plot only if there is an `x`."""
    if x is not None and (shown := [row for row in results.rows if None not in (row[x.column], row[y.column])]):
        draw_curve(shown, x, y, results.footnote(), directory.curve)
    _write_table(directory.table, results.rows)
    if results.skills:
        _write_table(directory.skills, results.skills)
    write_json(directory.results, results.model_dump(mode="json"))


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with publish(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        table.writeheader()
        table.writerows(rows)


def table_of_skills(results: Results) -> list[dict[str, object]]:
    """A row for each group of questions, with a column for each scale; empty without prompt following."""
    several = len({row["model"] for row in results.skills}) > 1
    table: dict[tuple[str, str], dict[str, object]] = {}
    for row in results.skills:
        about = {"model": row["model"]} if several else {}
        line = table.setdefault(
            (row["model"], row["group"]), about | {"group": row["group"], "num": row["num"], "number": row["number"]}
        )
        cell = {"value": row["value"], "value_ci95": row["ci95"]}
        line[f"{row['guidance_scale']:g}"] = _cell(cell, "value")
    return list(table.values())


def table_of(results: Results) -> list[dict[str, object]]:
    """Formats the rows, each number and its spread in one cell."""
    several = len({row["model"] for row in results.rows}) > 1
    return [
        ({"model": row["model"]} if several else {})
        | {"guidance": f"{row['guidance_scale']:g}", "images": row["num_images"]}
        | {name: _cell(row, name) for name in results.metrics}
        for row in results.rows
    ]


def protocol_lines(results: Results) -> list[str]:
    """The protocol, one setting per line, then metrics and remarks."""
    lines = [f"{name}: {_text(value)}" for name, value in results.protocol.items()]
    return [*lines, *(f"{name}: {text}" for name, text in results.metrics.items()), *results.notes]


def _cell(row: Mapping[str, Any], name: str) -> str:
    if row.get(name) is None:
        return "-"
    spread = next((row[f"{name}{kind}"] for kind in ("_ci95", "_std") if row.get(f"{name}{kind}") is not None), None)
    clean = f"{name}{CLEAN}"
    without = f" (clean {_cell(row, clean)})" if row.get(clean) is not None else ""
    return f"{row[name]:.4g}" + (f" ± {spread:.2g}" if spread is not None else "") + without


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Axis:
    """A plot axis: column, label, which way is better if either is, and whether it is one by default."""

    column: str
    label: str
    better: Literal["lower", "higher"] | None = None
    default: Literal["x", "y"] | None = None

    def __str__(self) -> str:
        return f"{self.label}, {self.better} is better" if self.better else self.label


def choose_axes(known: Mapping[str, Axis], x: str | None, y: str | None) -> tuple[Axis | None, Axis]:
    """The axes of those columns; by default agreement with prompts and FID.

    Without agreement there is no `x`, or the guidance scale if `y` was asked for. UserError for an unknown column.
    """
    for which, column in (("x", x), ("y", y)):
        if column is not None and column not in known:
            raise UserError(f"--{which} '{column}': this evaluation has no such column.{nearest(column, list(known))}")
    defaults = {axis.default: axis for axis in reversed(list(known.values()))}
    across = known[x] if x else defaults.get("x", known["guidance_scale"] if y else None)
    return across, known[y] if y else defaults["y"]


def draw_curve(rows: Sequence[Mapping[str, Any]], x: Axis, y: Axis, footnote: str, path: Path) -> None:
    """Plots one line per model, one labelled point per guidance scale, with thin bars for 95 % intervals.

    The rows are in order of scale, with `model`, `guidance_scale`, both columns, and `COLUMN_ci95` where known.
    """
    import matplotlib  # late: costs a second

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.0, 5.4), dpi=140)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.grid(color=_PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=9)
    labels = list(dict.fromkeys(row["model"] for row in rows))
    for number, label in enumerate(labels):
        _draw_line(axes, [row for row in rows if row["model"] == label], x, y, _COLORS[number % len(_COLORS)])
    axes.set_xlabel(str(x), fontsize=10, color=_INK)
    axes.set_ylabel(str(y), fontsize=10, color=_INK)
    axes.margins(x=0.08, y=0.12)
    if min(row[y.column] for row in rows) >= 0:  # intervals may reach below 0, distances cannot
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    axes.legend(frameon=False, fontsize=9, loc="best")
    lines = textwrap.wrap(footnote, 150)
    figure.text(0.012, 0.012, "\n".join(lines), fontsize=6.5, color="#57606a", va="bottom", ha="left")
    figure.tight_layout(rect=(0, max(0.075, 0.015 + 0.02 * len(lines)), 1, 1))
    with publish(path) as temporary:
        # Without the software tag the same numbers give the same bytes.
        figure.savefig(temporary, format="png", metadata={"Software": None})
    plt.close(figure)


def _draw_line(axes: Axes, rows: Sequence[Mapping[str, Any]], x: Axis, y: Axis, color: str) -> None:
    from matplotlib.patheffects import withStroke

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
