"""The card's table of an evaluation, from its results.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain.errors import UserError

_SHOWN = ("prompts_source", "num_prompts", "reference_source", "reference_sha256", "num_steps", "sampler", "weights")
_ALSO = ("seed", "size_px", "network", "network_sha256", "resize")


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        header: columns of the table.
        rows: its lines.
        metrics: name of each number -> what it is.
        protocol: settings that decided the numbers.
        curve: whether there is a plot.
    """

    header: list[str]
    rows: list[list[str]]
    metrics: dict[str, str]
    protocol: dict[str, Any]
    curve: bool


def read_evaluation(folder: Path) -> Evaluation | None:
    """The results in an evaluation's folder; None if there are none.

    Raises:
        UserError: they are damaged.
    """
    path = folder / "results.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        rows, protocol = content["rows"], content["protocol"]
        header = [name for name in rows[0] if any(row.get(name) is not None for row in rows)]
        shown = {name: protocol[name] for name in (*_SHOWN, *_ALSO) if name in protocol}
        table = [[_text(row.get(name)) for name in header] for row in rows]
        return Evaluation(header, table, dict(content["metrics"]), shown, (folder / "curve.png").exists())
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no results of an evaluation. Run `sdtrain evaluate` again.") from error


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_text(part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
