"""The metrics without the prompts and reference images that occur in a model's training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdtrain.evaluation.contamination import CLEAN, Found
from sdtrain.evaluation.distances import Gaussian
from sdtrain.evaluation.further import FurtherNumbers
from sdtrain.evaluation.metric import Arrays, Metric
from sdtrain.evaluation.metrics import ImageArrays, numbers, open_metrics
from sdtrain.evaluation.models import EvaluatedModel
from sdtrain.evaluation.protocol import Protocol

_FEWEST = 2
"""Images from which distances and intervals can be computed at all."""


class CleanNumbers:
    """The metrics without the prompts and reference images of `found`; None where fewer than two images are left.

    `real` is as for `open_metrics`.
    """

    def __init__(self, protocol: Protocol, real: ImageArrays | Gaussian, found: Found) -> None:
        self._kept = np.setdiff1d(np.arange(protocol.num_prompts), found.prompts)
        self._protocol = protocol.model_copy(update={"num_prompts": len(self._kept)})
        self._further = set(found.further_prompts.tolist())
        self._is_same = not len(found.prompts) and not len(found.reference)
        self._real, num_real = real, _FEWEST
        if isinstance(real, ImageArrays):
            some = np.setdiff1d(np.arange(_num_images(real)), found.reference)
            self._real, num_real = _taken(real, some), len(some)
        self._is_possible = min(len(self._kept), num_real) >= _FEWEST

    def row(
        self, metrics: Sequence[Metric], row: Mapping[str, Any], drawn: ImageArrays, captions: Arrays
    ) -> dict[str, Any]:
        """The columns `NAME_clean` of a row with the numbers of `metrics`, which they repeat if nothing was found.

        `drawn` and `captions` have a row for every prompt.
        """
        measured = row if self._is_same else self._measured(drawn, captions) if self._is_possible else {}
        found: dict[str, Any] = {f"num_images{CLEAN}": len(self._kept)}
        for metric in metrics:
            found[f"{metric.name}{CLEAN}"] = measured.get(metric.name)
            found[f"{metric.name}{CLEAN}_{metric.spread}"] = measured.get(f"{metric.name}_{metric.spread}")
        return found

    def further_row(self, following: FurtherNumbers, model: EvaluatedModel, scale: float) -> dict[str, Any]:
        """The same for numbers of images of their own."""
        measured = following.numbers(model, scale, self._further)
        return {f"{name}{CLEAN}{end}": measured[f"{name}{end}"] for name in following.metrics for end in ("", "_ci95")}

    def _measured(self, drawn: ImageArrays, captions: Arrays) -> dict[str, float | None]:
        some = {name: values[self._kept] for name, values in captions.items()}
        return numbers(self._metrics, _taken(drawn, self._kept), some)

    @cached_property
    def _metrics(self) -> list[Metric]:
        return open_metrics(self._protocol, self._real)


def _num_images(images: ImageArrays) -> int:
    return len(next(iter(images.features.values())))


def _taken(images: ImageArrays, numbers: NDArray[np.int64]) -> ImageArrays:
    features, others = (
        {name: values[numbers] for name, values in arrays.items()} for arrays in (images.features, images.others)
    )
    return ImageArrays(features, others)
