"""Compares LAION's scores with ours: correlation, difference, agreement on the recipe's limit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import duckdb

from sdtrain.report.plots import plot_pairs

# More points would overlap.
MAX_POINTS = 5_000
_SCORES = (
    ("aesthetic", "min_aesthetic", "aesthetic score (V2)"),
    ("aesthetic_v1", "min_aesthetic_v1", "aesthetic score (V1)"),
    ("pwatermark", "max_watermark", "P(watermark)"),
    ("punsafe", "max_unsafe", "P(unsafe)"),
    ("similarity", "min_similarity", "similarity to the caption"),
)


def draw_pairs(connection: duckdb.DuckDBPyConnection, limits: dict[str, float], images: Path) -> list[dict[str, str]]:
    """Draws and describes each score that both have; older views have fewer, or none."""
    known = connection.execute("SELECT column_name FROM duckdb_columns() WHERE table_name = 'score_pairs'").fetchall()
    drawn = []
    for column, rule, label in _SCORES:
        if (f"{column}_metadata",) not in known:
            continue
        both = f"FROM score_pairs WHERE {column}_metadata IS NOT NULL AND {column}_image IS NOT NULL"
        limit = limits.get(rule)
        metrics = _compare(connection, column, both, limit)
        if not metrics["num"]:
            continue
        pairs = connection.execute(
            f"SELECT {column}_metadata, {column}_image FROM (SELECT * {both}) "  # noqa: S608 - names are from here
            f"USING SAMPLE reservoir({MAX_POINTS} ROWS) REPEATABLE (1)"
        ).fetchall()
        plot_pairs(pairs, limit, label, images / f"{column}_pairs.png")
        drawn.append({"image": f"pictures/{column}_pairs.png", "text": _sentence(label, metrics, limit)})
    return drawn


def _compare(connection: duckdb.DuckDBPyConnection, column: str, both: str, limit: float | None) -> dict[str, Any]:
    metadata, image = f"{column}_metadata", f"{column}_image"
    names = ("num", "correlation", "difference", "same_side")
    row = connection.execute(
        f"SELECT count(*), corr({metadata}, {image}), avg({image} - {metadata}), "
        f"avg((({metadata} > $limit) = ({image} > $limit))::INTEGER) {both}",
        {"limit": limit},
    ).fetchone()
    return dict(zip(names, row or (0, None, None, None), strict=True))


def _sentence(label: str, metrics: dict[str, Any], limit: float | None) -> str:
    text = f"{label}: {metrics['num']:,} images, ours {metrics['difference']:+.3g} on average"
    correlation = metrics["correlation"]
    if correlation is not None and math.isfinite(correlation):  # a single value has none
        text += f", correlation {correlation:.3f}"
    if limit is not None:
        text += f", {100 * metrics['same_side']:.1f} % on the same side of {limit:g}"
    return text + "."
