"""Soft-TIFA and VQAScore from the probabilities of right answers.

GenEval 2 (arXiv:2512.16853): the arithmetic mean (AM) over an image's atoms estimates how many of them it shows, the
geometric mean (GM) whether it shows them all; both are then averaged over the prompts. Skills pool their questions
(AM), and groups of prompts with as many atoms average GM. Its tables multiply by 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdtrain.evaluation.distances import half_width_of_mean
from sdtrain.evaluation.judging.questions import JudgedPrompt
from sdtrain.evaluation.results import Axis

Floats = NDArray[np.float64]
AXES = {
    name: Axis(name, label, "higher")
    for name, label in (
        ("soft_tifa_am", "Soft-TIFA, arithmetic mean"),
        ("soft_tifa_gm", "Soft-TIFA, geometric mean"),
        ("vqa_score", "VQAScore"),
    )
}
METRICS = {
    "soft_tifa_am": "mean probability of the right answer to an atom's question; higher is better; "
    "95 % interval over prompts, ± soft_tifa_am_ci95",
    "soft_tifa_gm": "mean over prompts of the geometric mean of those probabilities; higher is better; "
    "95 % interval over prompts, ± soft_tifa_gm_ci95",
    "vqa_score": "mean probability of “yes” to the question whether the image shows the prompt; higher is better; "
    "95 % interval over prompts, ± vqa_score_ci95",
}


@dataclass(frozen=True)
class Judged:
    """The probabilities of right answers about one image, as its prompt's questions are; NaN without an answer."""

    prompt: JudgedPrompt
    probabilities: Floats

    @property
    def atoms(self) -> Floats:
        """Those of its atoms that have an answer."""
        return _known(self.probabilities[:-1])

    @property
    def am(self) -> float:
        """The arithmetic mean over its atoms; NaN if none has an answer."""
        return float(self.atoms.mean()) if len(self.atoms) else float("nan")

    @property
    def gm(self) -> float:
        """The geometric mean: 0 if an atom has no chance at all."""
        with np.errstate(divide="ignore"):
            return float(np.exp(np.log(self.atoms).mean())) if len(self.atoms) else float("nan")

    def of_skill(self, skill: str) -> Floats:
        """Those of the atoms that test a skill."""
        wanted = [number for number, each in enumerate(self.prompt.skills) if each == skill]
        return _known(self.probabilities[wanted])


def scores(images: Sequence[Judged]) -> dict[str, float | None]:
    """The columns of a row: each number and half of its 95 % interval; None where there are too few answers."""
    values = {
        "soft_tifa_am": [image.am for image in images],
        "soft_tifa_gm": [image.gm for image in images],
        "vqa_score": [image.probabilities[-1] for image in images],
    }
    found: dict[str, float | None] = {}
    for name, each in values.items():
        found[name], found[f"{name}_ci95"] = map(_known_or_none, _mean(np.asarray(each, np.float64)))
    return found


def breakdown(images: Sequence[Judged]) -> list[dict[str, Any]]:
    """Rows by skill (`soft_tifa_am` over its questions), then by number of atoms (`soft_tifa_gm` over its prompts)."""
    skills = dict.fromkeys(skill for image in images for skill in image.prompt.skills)
    of_skills = {skill: [image.of_skill(skill) for image in images] for skill in skills}
    rows = [_row(skill, sum(map(len, each)), "soft_tifa_am", *ratio(each)) for skill, each in of_skills.items()]
    for num in sorted({image.prompt.atom_count for image in images if image.prompt.atom_count is not None}):
        some = [image.gm for image in images if image.prompt.atom_count == num]
        rows.append(_row(f"{num} atoms", len(some), "soft_tifa_gm", *_mean(np.asarray(some, np.float64))))
    return rows


def _row(group: str, num: int, number: str, value: float, half: float) -> dict[str, Any]:
    numbers = {"value": _known_or_none(value), "ci95": _known_or_none(half)}
    return {"group": group, "num": num, "number": number} | numbers


def _known_or_none(value: float) -> float | None:
    return None if np.isnan(value) else value


def ratio(groups: Sequence[Floats]) -> tuple[float, float]:
    """The mean of all values, and half of its 95 % interval when only the groups are independent.

    Cochran 1977, "Sampling Techniques", section 2.11, for the ratio of sums to counts. NaN for no value, or one group.
    """
    some = [group for group in groups if len(group)]
    counts, sums = np.array([len(group) for group in some]), np.array([group.sum() for group in some])
    if not len(some):
        return float("nan"), float("nan")
    mean, num = float(sums.sum() / counts.sum()), len(some)
    return mean, half_width_of_mean((sums - mean * counts) * num / counts.sum())


def _mean(values: Floats) -> tuple[float, float]:
    known = _known(values)
    return (float(known.mean()), half_width_of_mean(known)) if len(known) else (float("nan"), float("nan"))


def _known(values: Floats) -> Floats:
    known: Floats = values[~np.isnan(values)]
    return known
