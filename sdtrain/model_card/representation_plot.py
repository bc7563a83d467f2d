"""Draws what `representation` measured: shares of captions and hosts, before and after the filters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdtrain.dataset.files import publish
from sdtrain.model_card.representation import DOWNLOADED, KEPT, NO_COUNTRY, SELECTED, Counts, Representation
from sdtrain.model_card.word_lists import UNDETERMINED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVELS = (SELECTED, DOWNLOADED, KEPT)
_COLORS = ("#9ecae1", "#4292c6", "#08306b")
_NUM_SHOWN = 12
_BAR = 0.26
_INCHES_A_ROW = 0.34


def plot_representation(found: Representation, path: Path) -> None:
    """Writes a PNG: groups of captions on the left, languages and countries on the right."""
    # Not pyplot, which would keep the figures and choose a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [one.model_copy(update={"name": f"{theme}: {one.name}"}) for theme, one in _spoken_of(found)]
    right = [_known(found.languages, UNDETERMINED), _known(found.countries, NO_COUNTRY)]
    height = max(4.0, _INCHES_A_ROW * max(len(groups), sum(map(len, right)) + 3) + 1.2)
    figure = Figure(figsize=(13 if groups else 7, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2 if groups else 1, height_ratios=[max(1, len(part)) for part in right])
    if groups:
        _bars(figure.add_subplot(grid[:, 0]), found, groups, "captions with a word of the list")
    _bars(
        figure.add_subplot(grid[0, -1]),
        found,
        right[0],
        _titled("language of the caption", found, found.languages, UNDETERMINED),
    )
    _bars(
        figure.add_subplot(grid[1, -1]),
        found,
        right[1],
        _titled("country of the host's name", found, found.countries, NO_COUNTRY),
    )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    with publish(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _known(counts: Sequence[Counts], unknown: str) -> Sequence[Counts]:
    """The most frequent ones but the unknown, beside whose bar the others would hardly be seen."""
    return [one for one in counts if one.name != unknown][:_NUM_SHOWN]


def _titled(title: str, found: Representation, counts: Sequence[Counts], unknown: str) -> str:
    share = next((found.shares(one, SELECTED) for one in counts if one.name == unknown), 0.0)
    return f"{title} ({unknown}: {share or 0.0:.0%} of the selected)"


def _spoken_of(found: Representation) -> Sequence[tuple[str, Counts]]:
    return [(theme, one) for theme, groups in found.groups.items() for one in groups if one.nums[0]]


def _bars(axes: Axes, found: Representation, rows: Sequence[Counts], title: str) -> None:
    for number, (level, color) in enumerate(zip(LEVELS, _COLORS, strict=True)):
        places = [at + (number - 1) * _BAR for at in range(len(rows))]
        shares = [100 * (found.shares(one, level) or 0.0) for one in rows]
        axes.barh(places, shares, _BAR, color=color, label=level)
    axes.set_yticks(range(len(rows)), [one.name for one in rows])
    axes.invert_yaxis()
    axes.set_xlabel("% of rows")
    axes.set_title(title, loc="left", fontsize=10)
    if not rows:  # the title says that all are unknown
        axes.set_axis_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
