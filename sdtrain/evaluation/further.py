"""Numbers of a sweep that need images of their own, beside those of its prompts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sdtrain.evaluation.layout import EvaluationDir
    from sdtrain.evaluation.models import EvaluatedModel
    from sdtrain.evaluation.sweep import Step
    from sdtrain.preflight.checks import Check


class FurtherNumbers(Protocol):
    """Measures each model of a sweep at each scale by steps of its own, as `sdtrain.evaluation.judging` does."""

    @property
    def directory(self) -> EvaluationDir:
        """Where its images are."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Their prompts, in order."""

    @property
    def metrics(self) -> Mapping[str, str]:
        """Name -> description of each number."""

    def checks(self) -> list[Check]:
        """What it will open, opened before any work."""

    def steps(self) -> list[Step]:
        """Its steps; each skips finished parts."""

    def numbers(self, model: EvaluatedModel, scale: float, left_out: Collection[int] = ()) -> dict[str, float | None]:
        """Each number and half of its 95 % interval (NAME_ci95), once every step is finished.

        `left_out` are numbers of prompts that do not count.
        """

    def skills(self) -> list[dict[str, Any]]:
        """The same by groups of questions, for every model and scale."""

    def described(self) -> dict[str, Any]:
        """What decides the numbers, for the protocol."""

    def notes(self) -> list[str]:
        """Caveats for readers of these numbers."""
