"""Contamination: an evaluation's prompts and reference images that are in the training data, and the numbers without.

Who finds them is above this layer (`filters.contamination`): here stands what was found, and what follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydantic import Field

from sdtrain.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sdtrain.evaluation.sweep import Step
    from sdtrain.preflight.checks import Check

CLEAN = "_clean"
"""Ends the name of a number that leaves out whatever occurs in the training data."""


class Occurrences(Settings):
    """How many of an evaluation's items occur in the training data.

    `by` counts them by how they were recognised; one may be recognised in several ways, and counts once in `found`.
    """

    num: int
    found: int
    by: dict[str, int]

    def __str__(self) -> str:
        """For a sentence: "12 of 10,000 (text 12)"."""
        ways = ", ".join(f"{way} {num:,}" for way, num in self.by.items() if num)
        return f"{self.found:,} of {self.num:,}" + (f" ({ways})" if ways else "")


class Contamination(Settings):
    """What an evaluation shares with one model's training data; `reference` is None if it is only statistics."""

    training_data: list[str]
    """The datasets, each with its number of samples."""
    method: str
    """How items were recognised, with all limits."""
    prompts: Occurrences
    reference: Occurrences | None = None
    further_prompts: Occurrences | None = None
    """Those of prompt following, if it is measured."""
    notes: list[str] = Field(default=[])

    def sentence(self) -> str:
        """The counts in words."""
        images = f", of the reference images {self.reference}" if self.reference else ""
        judged = f", of the prompts with questions {self.further_prompts}" if self.further_prompts else ""
        return f"In the training data occur, of the prompts, {self.prompts}{images}{judged}"


@dataclass(frozen=True)
class Found:
    """Numbers of the prompts, reference images and further prompts that occur in a model's training data.

    `record` is what the results keep of it.
    """

    prompts: NDArray[np.int64]
    reference: NDArray[np.int64]
    further_prompts: NDArray[np.int64]
    record: Contamination


class TrainingSearch(Protocol):
    """A search for an evaluation's prompts and reference images in its models' training data."""

    def checks(self) -> list[Check]:
        """What it will open, opened before any work."""

    def steps(self) -> list[Step]:
        """Its steps; each skips finished parts."""

    def found(self) -> dict[str, Found]:
        """What was found, by a model's label, once every step is finished; models of unknown data are left out."""

    def notes(self) -> list[str]:
        """Why a model's training data was not searched, in sentences."""


def contamination_notes(found: Mapping[str, Found], search: TrainingSearch) -> list[str]:
    """Sentences for the results: what each model's training data shares with the evaluation."""
    several = len(found) > 1
    said = [f"{f'{model}: ' if several else ''}{each.record.sentence()}." for model, each in found.items()]
    said += list(dict.fromkeys(note for each in found.values() for note in each.record.notes))
    methods = dict.fromkeys(each.record.method for each in found.values())
    return [*said, *(f"Numbers in “{CLEAN}” leave these out; {method}" for method in methods), *search.notes()]
