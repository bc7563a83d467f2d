"""Renders report.html from a dataset's DuckDB views, a training log and a grid of samples."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import jinja2

from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.dataset.tables.connection import connected
from sdtrain.errors import UserError
from sdtrain.report.captions import draw_captions
from sdtrain.report.examples import Counts, FindImage, Gallery, RuleThreshold, count_examples, galleries
from sdtrain.report.plots import plot_funnel, plot_histogram
from sdtrain.report.sections import draw_pairs, draw_training
from sdtrain.report.summary import Facts, Summary, anchor, place_drawn
from sdtrain.training.run_dir import RunDir

# More do not change a histogram.
MAX_VALUES = 200_000
_FUNNEL = ("stage", "reason", "meaning", "dropped", "remaining")


@dataclass(frozen=True)
class SampleSection:
    """The grid of samples, and a checker's counts."""

    image: Path
    text: str
    table: list[tuple[str, str, int, float, float]] = field(default_factory=list)
    """(model, prompts, number of images, share of right colours, share of right shapes)."""
    command: str = ""
    """Gives the counts again."""


@dataclass(frozen=True)
class ImageSection:
    """A section that is one image with its text."""

    title: str
    text: str
    image: Path
    lines: Sequence[str] = ()
    command: str = ""
    """Gives its numbers and its image again."""


@dataclass(frozen=True)
class Report:
    """The content of a report; sections without a source are omitted."""

    title: str
    lead: str
    dataset: DatasetDir
    limits: dict[str, float]
    """The recipe's, drawn in the histograms."""
    place: str = "."
    """How the page's commands name the dataset: by default from its own folder, where the page is."""
    summary: Summary | None = None
    training: RunDir | None = None
    training_command: str = ""
    samples: SampleSection | None = None
    sections: Sequence[ImageSection] = ()
    """Shown after samples and training."""
    card: Path | None = None
    find_image: FindImage | None = None
    """A local file, if any, for a URL that was never fetched."""
    thresholds: Sequence[RuleThreshold] = ()
    prepare: Callable[[duckdb.DuckDBPyConnection], None] = lambda connection: None
    """Gives a connection access to remote metadata."""
    narrow: Callable[[duckdb.DuckDBPyConnection], str] = lambda connection: ""
    """Lets the connection's views show a part of a large dataset from then on; describes the part, or says nothing."""
    scores_note: str = ""
    warn: Callable[[Any], Sequence[str]] = lambda funnel: ()
    """The warnings that rows of the funnel call for, shown before all numbers."""


def write_report(report: Report, path: Path) -> Path:
    """Writes `path`, with its diagrams and examples in a folder `images` beside it.

    UserError if the dataset has no views or no decisions yet.
    """
    if not report.dataset.database.exists():
        raise UserError(f"There is no {report.dataset.database}; run the build, or `sdtrain views`, first.")
    images = path.parent / "pictures"
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir(parents=True)
    with connected(report.dataset.database, read_only=True) as connection:
        report.prepare(connection)
        funnel = connection.view("funnel").select(*map(duckdb.ColumnExpression, _FUNNEL)).fetchall()
        if not funnel:
            raise UserError(f"{report.dataset.root} is not built to its decisions yet; run the build again.")
        counts = count_examples(connection)  # of the whole dataset, before it is narrowed
        context: dict[str, Any] = {
            "title": report.title,
            "lead": report.lead,
            "facts": [_facts(funnel, connection, f"sdtrain funnel {report.place}")],
            "place": report.place,
            "funnel": funnel,
            "remarks": [row[0] for row in connection.execute("FROM remarks").fetchall()],
            "part": report.narrow(connection),
            "funnel_image": _draw_funnel(funnel, images),
            "histograms": _draw_histograms(connection, report.limits, images),
            "galleries": _relative(_galleries(connection, report, counts, images), path.parent),
            "pairs": draw_pairs(connection, report.limits, images),
            "captions": draw_captions(connection, report.dataset, images),
            "scores_note": report.scores_note,
            "warnings": report.warn([dict(zip(_FUNNEL, row, strict=True)) for row in funnel]),
            "database": report.dataset.database.name,
        }
    context["training"] = draw_training(report.training, images) if report.training else None
    context["samples"] = _place_samples(report.samples, images) if report.samples else None
    context["card"] = os.path.relpath(report.card, path.parent) if report.card else None
    context["sections"] = [_place_section(section, images) for section in report.sections]
    context["training_command"] = report.training_command
    if report.summary:
        context |= _summary(report.summary, context, images)
    page = _template().render(context)
    with publish(path) as temporary:
        temporary.write_text(page)
    return path


def _summary(summary: Summary, context: dict[str, Any], images: Path) -> dict[str, Any]:
    """The numbers of the training and the summary's own behind those of the dataset, images, curves."""
    training = context["training"]
    learnt = [Facts(training.numbers, context["training_command"])] if training else []
    curves = [("Training", training.curve)] if training else []
    curves += [(shown["title"], shown["image"]) for shown in context["sections"] if shown["title"] == summary.curve]
    facts = [*context["facts"], *learnt, *summary.facts]
    return {"summary": summary, "facts": facts, "drawn": place_drawn(summary.drawn, images), "curves": curves}


def _facts(funnel: list[tuple[Any, ...]], connection: duckdb.DuckDBPyConnection, command: str) -> Facts:
    rows_in = funnel[0][3] + funnel[0][4]
    selected = connection.execute("SELECT count(*) FROM decisions").fetchone()
    fetched = connection.execute("SELECT sum(num_out)::BIGINT FROM stages WHERE stage = 'download'").fetchone()
    counts = [(funnel[0][2], rows_in), ("selected", selected[0] if selected else 0)]
    counts += [("downloaded", fetched[0] if fetched else 0), ("kept", funnel[-1][4])]
    return Facts([(f"{count:,}", name) for name, count in counts], command)


def _draw_funnel(funnel: list[tuple[Any, ...]], images: Path) -> str:
    plot_funnel([(f"{row[0]}: {row[1] or row[2]}", row[3], row[4]) for row in funnel], images / "funnel.png")
    return "pictures/funnel.png"


def _draw_histograms(
    connection: duckdb.DuckDBPyConnection, limits: dict[str, float], images: Path
) -> list[dict[str, str]]:
    """Draws a histogram per metadata score, with the query of its counts: kept rows in front of all rows."""
    drawn = []
    scores = (("aesthetic", "min_aesthetic", "aesthetic score (V2)"), ("pwatermark", "max_watermark", "P(watermark)"))
    for column, rule, label in scores:
        groups = {view: _column(connection, view, column) for view in ("metadata", "kept")}
        if not any(groups.values()):
            continue
        plot_histogram(groups, limits.get(rule), label, images / f"{column}.png")
        query = f"SELECT (SELECT count({column}) FROM metadata) AS metadata, count({column}) AS kept FROM kept"  # noqa: S608
        drawn.append({"image": f"pictures/{column}.png", "query": query})
    return drawn


def _galleries(connection: duckdb.DuckDBPyConnection, report: Report, counts: Counts, images: Path) -> list[Gallery]:
    return galleries(connection, report.dataset, images, counts, report.find_image, report.thresholds)


def _column(connection: duckdb.DuckDBPyConnection, view: str, column: str) -> list[float]:
    values = connection.view(view).filter(duckdb.ColumnExpression(column).isnotnull()).select(column)
    # A name that no view has, as it would hide that view from then on.
    sampled = values.query("one_score", f"FROM one_score USING SAMPLE reservoir({MAX_VALUES} ROWS) REPEATABLE (1)")
    return [row[0] for row in sampled.fetchall()]


def _place_samples(samples: SampleSection, images: Path) -> dict[str, Any]:
    shutil.copyfile(samples.image, images / "samples.png")
    shown = {"image": "pictures/samples.png", "text": samples.text, "table": samples.table}
    return shown | {"command": samples.command}


def _place_section(section: ImageSection, images: Path) -> dict[str, Any]:
    shutil.copyfile(section.image, images / section.image.name)
    shown = {"title": section.title, "text": section.text, "lines": section.lines, "command": section.command}
    return shown | {"image": f"pictures/{section.image.name}"}


def _relative(found: list[Gallery], root: Path) -> list[dict[str, Any]]:
    return [
        {
            "title": gallery.title,
            "status": gallery.status,
            "lines": gallery.lines,
            "rows": [
                [(shown.thumbnail.relative_to(root).as_posix(), shown.text, shown.kept) for shown in row]
                for row in gallery.rows
                if row
            ],
        }
        for gallery in found
    ]


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True)
    environment.filters["anchor"] = anchor
    return environment.get_template("template.html")
