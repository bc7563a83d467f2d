"""Keeps what `representation` measured of a run's datasets, as JSON and diagrams, and prepares it for the card."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sdtrain.dataset.files import publish
from sdtrain.dataset.layout import DatasetDir
from sdtrain.model_card.representation import DOWNLOADED, KEPT, SELECTED, Counts, Representation, key_of, measure
from sdtrain.model_card.word_lists import WordLists

RECORD = "representation.json"
LEVELS = (SELECTED, DOWNLOADED, KEPT)
_NUM_SHOWN, _NUM_CHANGES = 15, 8
_FEWEST = 100
"""Captions that a group needs before a change of its share is shown."""
_LEAST_DEVIATION = 3.0
_ALL = TypeAdapter(list[Representation])


def measure_datasets(run: Path, datasets: Mapping[str, Path], lists: WordLists) -> list[Representation]:
    """Measures the datasets by their names and keeps what was found; what is known already is not measured again.

    Where the tables of one are not on this machine, an earlier measurement stays.
    """
    before = read_representation(run)
    known = {one.name: one for one in before}
    for name, root in datasets.items():
        dataset = DatasetDir(root)
        if name in known and known[name].key == key_of(dataset, lists):
            continue
        if found := measure(dataset, name, lists):
            known[name] = found
    kept = [known[name] for name in datasets if name in known]
    if kept and kept != before:
        with publish(run / RECORD) as temporary:
            temporary.write_bytes(_ALL.dump_json(kept, indent=1) + b"\n")
    return kept


def read_representation(run: Path) -> list[Representation]:
    """What was measured before; nothing if there is no such record, or it is of another version."""
    try:
        return _ALL.validate_json((run / RECORD).read_bytes())
    except (OSError, ValidationError):
        return []


def plot_path(run: Path, number: int) -> Path:
    """The diagram of the dataset with this place in the record."""
    return run / f"representation-{number + 1}.png"


def plot_all(run: Path, found: Sequence[Representation]) -> None:
    """Writes the diagrams of all datasets, unless they are there and follow the record."""
    from sdtrain.model_card.representation_plot import plot_representation

    for number, one in enumerate(found):
        plot = plot_path(run, number)
        if not plot.exists() or plot.stat().st_mtime_ns < (run / RECORD).stat().st_mtime_ns:
            plot_representation(one, plot)


@dataclass(frozen=True)
class Section:
    """What the card shows of a dataset.

    Attributes:
        tables: heading -> rows of name and shares at `LEVELS`.
        changes: sentences on the filters that changed a group's share the most.
        crossed: rows of the themes that are counted together.
        plot: the diagram's file name, if it was drawn.
    """

    found: Representation
    tables: dict[str, list[list[str]]]
    changes: list[str]
    crossed: list[list[str]]
    plot: str | None


def sections(run: Path) -> Iterator[Section]:
    """Yields what the card shows of each measured dataset."""
    for number, one in enumerate(read_representation(run)):
        tables = {
            "language of the caption": _rows(one, one.languages[:_NUM_SHOWN]),
            "country of the host's name": _rows(one, one.countries[:_NUM_SHOWN]),
            **{theme: _rows(one, [group for group in groups if group.nums[0]]) for theme, groups in one.groups.items()},
        }
        plot = plot_path(run, number)
        yield Section(
            found=one,
            tables={heading: rows for heading, rows in tables.items() if rows},
            changes=_changes(one),
            crossed=_crossed(one),
            plot=plot.name if plot.exists() else None,
        )


def _rows(found: Representation, counts: Sequence[Counts]) -> list[list[str]]:
    return [[one.name, *(_share(found.shares(one, level)) for level in LEVELS)] for one in counts]


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.3%}" if share < 0.001 else f"{share:.2%}"


def _changes(found: Representation) -> list[str]:
    """The steps that changed a group's share by the largest factors, as far as that is hardly chance."""
    changes = []
    for theme, groups in found.groups.items():
        for group, at in itertools.product(groups, range(len(found.levels) - 1)):
            before, after = found.levels[at], found.levels[at + 1]
            nums = group.nums[at], group.nums[at + 1]
            if nums[0] >= _FEWEST and nums[1] and _deviation(before.nums[0], after.nums[0], *nums) > _LEAST_DEVIATION:
                shares = nums[0] / before.nums[0], nums[1] / after.nums[0]
                text = f"{_share(shares[0])} {before.name}, {_share(shares[1])} {after.name}"
                factor = shares[1] / shares[0]
                changes.append((abs(math.log(factor)), f"{theme}, {group.name}: {text} (x {factor:.2f})"))
    return [text for _, text in sorted(changes, reverse=True)[:_NUM_CHANGES]]


def _deviation(num_before: int, num_after: int, of_group_before: int, of_group_after: int) -> float:
    """Standard deviations between the group's shares of the dropped and the other rows: two-proportion z-test."""
    dropped, of_dropped, share = num_before - num_after, of_group_before - of_group_after, of_group_before / num_before
    if not dropped or not num_after or share == 1:
        return 0.0
    error = math.sqrt(share * (1 - share) * (1 / num_after + 1 / dropped))
    return abs(of_group_after / num_after - of_dropped / dropped) / error


def _crossed(found: Representation) -> list[list[str]]:
    rows = [(name, nums) for name, nums in found.crossed.items() if nums["captions"]]
    if not rows:
        return []
    header = ["", *rows[0][1]]
    return [header, *([name, *(f"{num:,}" for num in nums.values())] for name, nums in rows)]
