"""What an evaluation leaves: results.json, results.csv, curve.png."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdtrain.dataset.files import publish
from sdtrain.errors import UserError
from sdtrain.evaluation.layout import EvaluationDir, write_json
from sdtrain.settings import Settings

_LABELS = {
    "fid": "FID",
    "fid_demo_features": "FID of the demo's own features",
    "clip_score": "CLIP score (cosine)",
    "agreement_demo_checker": "named colours and shapes that the demo's checker sees",
}


class Results(Settings):
    """The numbers of an evaluation, and all that decided them."""

    protocol: dict[str, Any]
    """Every setting, and digests of reference, prompts, networks and models."""
    metrics: dict[str, str]
    """What each number is, in words."""
    notes: list[str]
    """What a reader has to know."""
    rows: list[dict[str, Any]]
    """One for each model and scale: `model`, `guidance_scale`, `num_pictures`, and each number with its spread."""

    def footnote(self) -> str:
        """The protocol in a few words, for the plot."""
        p = self.protocol
        network = f"{p['network']} ({p['resize']} resize)" if p["network"] == "inception" else "the demo's own"
        drawn = f"{p['num_prompts']:,} images a point, {p['size_px']} px, {p['num_steps']} {p['sampler'].upper()} steps"
        return (
            f"{drawn}, {p['weights']} weights, seed {p['seed']}; prompts {p['prompts_source']}; "
            f"reference {p['reference_source']} (sha256 {p['reference_sha256'][:12]}); network {network}, "
            f"sha256 {p['network_sha256'][:12]}. Beside each point: its guidance scale; bars: 95 % intervals."
        )


def read_results(path: Path) -> Results:
    """Reads results.json.

    Raises:
        UserError: there is none, or it is of another form.
    """
    try:
        return Results.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} holds no results of an evaluation. Run `sdtrain evaluate` for them.") from error


def write_results(directory: EvaluationDir, results: Results, x: str | None, y: str) -> None:
    """Writes all three files, results.json last; without agreement there is no plot.

    Args:
        directory: of the evaluation.
        results: the numbers.
        x: the column of agreement with prompts.
        y: the column of distance from real images.
    """
    if x is not None:
        from sdtrain.evaluation.curve import Axis, draw_curve  # late: matplotlib

        axes = Axis(x, _LABELS[x]), Axis(y, _LABELS[y])
        draw_curve(results.rows, *axes, results.footnote(), directory.curve)
    with publish(directory.table) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, list(results.rows[0]))
        table.writeheader()
        table.writerows(results.rows)
    write_json(directory.results, results.model_dump(mode="json"))


def table_of(results: Results) -> list[dict[str, object]]:
    """The rows with each number and its spread in one cell."""
    several = len({row["model"] for row in results.rows}) > 1
    return [
        ({"model": row["model"]} if several else {})
        | {"guidance": f"{row['guidance_scale']:g}", "images": row["num_pictures"]}
        | {name: _cell(row, name) for name in results.metrics}
        for row in results.rows
    ]


def protocol_lines(results: Results) -> list[str]:
    """The protocol, a setting a line, then what the numbers are, then the notes."""
    lines = [f"{name}: {_text(value)}" for name, value in results.protocol.items()]
    return [*lines, *(f"{name}: {text}" for name, text in results.metrics.items()), *results.notes]


def _cell(row: Mapping[str, Any], name: str) -> str:
    spread = next((row[f"{name}{kind}"] for kind in ("_ci95", "_std") if row.get(f"{name}{kind}") is not None), None)
    return f"{row[name]:.4g}" + (f" ± {spread:.2g}" if spread is not None else "")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
