"""The metrics without the prompts and reference images that occur in a model's training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdtrain.evaluation.contamination import CLEAN, Found
from sdtrain.evaluation.distances import Gaussian
from sdtrain.evaluation.metrics import Arrays, Metric, open_metrics
from sdtrain.evaluation.protocol import Protocol

_FEWEST = 2
"""Images from which distances and intervals can be computed at all."""


class CleanNumbers:
    """The metrics without the prompts and reference images of `found`.

    `real` is as for `open_metrics`. Numbers of fewer than two images are None.
    """

    def __init__(self, protocol: Protocol, real: Arrays | Gaussian, found: Found) -> None:
        self._kept = np.setdiff1d(np.arange(protocol.num_prompts), found.prompts)
        self._protocol = protocol.model_copy(update={"num_prompts": len(self._kept)})
        self._real = real if isinstance(real, Gaussian) else _without(real, found.reference)
        self.is_same = not len(found.prompts) and not len(found.reference)

    @property
    def is_possible(self) -> bool:
        """Whether enough is left."""
        num_real = _FEWEST if isinstance(self._real, Gaussian) else min(map(len, self._real.values()), default=_FEWEST)
        return min(len(self._kept), num_real) >= _FEWEST

    def row(self, metrics: Sequence[Metric], numbers: Mapping[str, Any], drawn: Arrays, captions: Arrays) -> Any:
        """The columns `NAME_clean` of a row with its `metrics` and their `numbers`; those again if nothing was found.

        `drawn` and `captions` have a row for every prompt.
        """
        found: dict[str, Any] = {f"num_images{CLEAN}": len(self._kept)}
        measured = self._measured(drawn, captions) if self.is_possible and not self.is_same else {}
        for metric in metrics:
            same = (numbers[metric.name], numbers[f"{metric.name}_{metric.spread}"]) if self.is_same else (None, None)
            number, spread = measured.get(metric.name, same)
            found |= {f"{metric.name}{CLEAN}": number, f"{metric.name}{CLEAN}_{metric.spread}": spread}
        return found

    def _measured(self, drawn: Arrays, captions: Arrays) -> dict[str, tuple[float, float]]:
        some = [{name: values[self._kept] for name, values in arrays.items()} for arrays in (drawn, captions)]
        return {metric.name: metric.measure(*some) for metric in self._metrics}

    @cached_property
    def _metrics(self) -> list[Metric]:
        return open_metrics(self._protocol, self._real)


def _without(arrays: Arrays, left_out: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    return {name: np.delete(values, left_out, axis=0) for name, values in arrays.items()}
