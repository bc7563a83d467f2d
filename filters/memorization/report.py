"""The memorisation report: sheets, a histogram and JSON in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from filters.memorization.check import Memorised, Verdict
from filters.search.hits import image_of
from filters.search.sheet import Cell, Row, write_sheet
from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir

_ROWS_SHOWN = 24


def write_memorised(found: Memorised, dataset: DatasetDir, folder: Path) -> list[Path]:
    """Writes memorised.json, .png and .html and similarities.png into a folder; returns their paths.

    The sheets show at most the first 24 samples with their neighbours in `dataset`; the JSON has all.
    """
    paths = [folder / name for name in ("memorised.json", "memorised.png", "memorised.html", "similarities.png")]
    with publish(paths[0]) as temporary:
        rows = [verdict.row() for verdict in found.verdicts]
        temporary.write_text(json.dumps(found.summary() | {"samples": rows}, indent=1, ensure_ascii=False) + "\n")
    same, alike = found.count("same"), found.count("alike")
    title = f"{len(found.verdicts):,} samples: {same:,} same as a training image, {alike:,} alike"
    shown = [_row(found, verdict, dataset) for verdict in found.verdicts[:_ROWS_SHOWN]]
    for path in paths[1:3]:
        write_sheet(path, title, found.notes, shown)
    _plot(found, paths[3])
    return paths


def _plot(found: Memorised, path: Path) -> None:
    from sdtrain.report.plots import plot_histogram

    groups = {"training images": list(found.calibration.nearest), "samples": [v.similarity for v in found.verdicts]}
    with publish(path) as temporary:
        drawn = temporary.with_suffix(".png")  # matplotlib picks the format by suffix
        plot_histogram(groups, found.limits.threshold, "cosine with the nearest (other) training image", drawn)
        drawn.replace(temporary)


def _row(found: Memorised, verdict: Verdict, dataset: DatasetDir) -> Row:
    named = verdict.sample.prompt or verdict.sample.name
    return Row(f"{verdict.kind}: {named}", list(_cells(found, verdict, named, dataset)))


def _cells(found: Memorised, verdict: Verdict, named: str, dataset: DatasetDir) -> Iterator[Cell]:
    yield Cell(verdict.sample.read(), "sample", named)
    for neighbour in verdict.neighbours:
        hit, head = neighbour.hit, f"{neighbour.hit.similarity:.3f}"
        if neighbour.hash_bits is not None:
            head += f", {neighbour.hash_bits} bits, px {neighbour.pixel_distance:.2f}"
        marked = neighbour.is_same(found.limits) or neighbour.is_near_duplicate(found.limits)
        yield Cell(image_of(dataset, hit), head, f"{hit.caption} ({hit.key})", marked)
