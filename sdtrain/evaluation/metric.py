"""The base of a metric: one number of a model's images at one guidance scale, with its spread."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from numpy.typing import NDArray

from sdtrain.evaluation.protocol import Protocol

Arrays = Mapping[str, NDArray[Any]]


class Metric(ABC):
    """One number with its spread. To add one, subclass this or `FeatureMetric` and list the class in METRICS.

    Arrays have one row per image: `features` (n, d) of a feature network, `clip` (n, e) of length 1, and `shown` (n,),
    a stand-in's score of an image for its prompt. `drawn`, `real` and `captions` name the arrays needed. `name` is the
    number's column in the results, `NAME_SPREAD` that of its spread: half of a 95 % interval, or a standard deviation.
    `label` names it on an axis of the plot; `axis` is set if it is one by default.
    """

    name: str
    description: str
    better: Literal["lower", "higher"] = "lower"
    spread: Literal["ci95", "std"] = "ci95"
    spread_text: str = "95 % interval, ± {column}"
    drawn: tuple[str, ...] = ()
    real: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    axis: Literal["x", "y"] | None = None
    label: str = ""

    def __init__(self, protocol: Protocol, real: Any):
        self.protocol = protocol

    @classmethod
    def applies(cls, protocol: Protocol, has_images: bool) -> bool:
        """Whether to measure it; `has_images` is False if the reference is statistics."""
        return has_images or not cls.real

    @abstractmethod
    def measure(self, drawn: Arrays, captions: Arrays) -> tuple[float, float]:
        """The number and its spread."""

    def remarks(self) -> list[str]:
        """Caveats for readers of this number."""
        return []
