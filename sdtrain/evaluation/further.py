"""Numbers of a sweep that need images of their own, beside those of its prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sdtrain.evaluation.models import EvaluatedModel
    from sdtrain.evaluation.sweep import Step
    from sdtrain.preflight.checks import Check


class FurtherNumbers(Protocol):
    """Measures each model of a sweep at each scale by steps of its own, as `sdtrain.evaluation.judging` does."""

    @property
    def metrics(self) -> Mapping[str, str]:
        """Name -> description of each number."""

    def checks(self) -> list[Check]:
        """What it will open, opened before any work."""

    def steps(self) -> list[Step]:
        """Its steps; each skips finished parts."""

    def numbers(self, model: EvaluatedModel, scale: float) -> dict[str, float | None]:
        """Each number and its spread, by column, once every step is finished."""

    def skills(self) -> list[dict[str, Any]]:
        """The same by groups of questions, for every model and scale."""

    def described(self) -> dict[str, Any]:
        """What decides the numbers, for the protocol."""

    def notes(self) -> list[str]:
        """Caveats for readers of these numbers."""
