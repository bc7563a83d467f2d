"""The metrics of one model at one guidance scale, each with its description."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sdtrain.errors import UserError
from sdtrain.evaluation.distances import (
    KID_SUBSETS,
    FrechetDistance,
    Gaussian,
    cmmd,
    gaussian_of,
    half_width_of_mean,
    kid,
    kid_subset_size,
)
from sdtrain.evaluation.neighbours import DENSITY_K, MOST_K, PRECISION_K, RealNeighbours
from sdtrain.evaluation.networks import FeatureNetwork, feature_network, stand_in
from sdtrain.evaluation.protocol import STAND_INS, Protocol
from sdtrain.evaluation.results import Axis

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


class RealFeatures:
    """One network's features of the real images, or their statistics, and what several metrics compute from them."""

    def __init__(self, network: str, of: NDArray[Any] | Gaussian):
        self.name, self.network, self._of = network, feature_network(network), of

    @cached_property
    def gaussian(self) -> Gaussian:
        """Mean and covariance; UserError for statistics of another network."""
        if not isinstance(self._of, Gaussian):
            return gaussian_of(self._of)
        if (num := len(self._of.mean)) != self.network.num_features:
            raise UserError(
                f"The reference's statistics are of {num} features, and network '{self.name}' gives "
                f"{self.network.num_features}. Name statistics made with this network, or the images themselves."
            )
        return self._of

    @property
    def features(self) -> NDArray[Any]:
        """(n, d), one row an image; UserError if there are only statistics."""
        if isinstance(self._of, Gaussian):
            raise UserError("The reference is an .npz of statistics, and this metric needs images. Name the images.")
        return self._of

    @cached_property
    def neighbours(self) -> RealNeighbours:
        """The neighbourhoods of the images; UserError as for `features`."""
        return RealNeighbours(self.features)


class FeatureMetric(Metric):
    """A number computed from one feature network's `features`; each network of the protocol gets its own.

    The class names the number without the network, whose suffix is added.
    """

    drawn = ("features",)

    def __init__(self, protocol: Protocol, real: RealFeatures):
        super().__init__(protocol, real)
        self.of = real
        self.name, self.label = self.names(real.network)

    @classmethod
    def names(cls, network: FeatureNetwork) -> tuple[str, str]:
        """The number's column and label for a network."""
        return f"{cls.name}{network.suffix}", f"{cls.label}{network.label}"


class Fid(FeatureMetric):
    """The Fréchet distance."""

    name, label = "fid", "FID"
    spread_text = "95 % interval, ± {column} (grouped jackknife)"
    real = ("features",)
    axis = "y"

    def __init__(self, protocol: Protocol, real: RealFeatures):
        super().__init__(protocol, real)
        self.description = f"Fréchet distance of {real.network.description}"
        self._frechet = FrechetDistance(real.gaussian)

    @classmethod
    def names(cls, network: FeatureNetwork) -> tuple[str, str]:
        """FID is Inception's; of other features it goes by another name."""
        name, label = network.frechet
        return f"{name}{network.suffix}", f"{label}{network.label}"

    @classmethod
    def applies(cls, protocol: Protocol, has_images: bool) -> bool:
        """Always: statistics suffice."""
        return True

    def measure(self, drawn: Arrays, captions: Arrays) -> tuple[float, float]:
        """The distance of the drawn images' features."""
        features = drawn["features"]
        return self._frechet.to(gaussian_of(features)), self._frechet.spread(features)

    def remarks(self) -> list[str]:
        """Warns of a singular covariance."""
        real = self._frechet.reference
        size, nums = (
            len(real.mean),
            {"images were drawn": self.protocol.num_prompts, "real images were taken": real.num},
        )
        few = [f"{num:,} {which}" for which, num in nums.items() if num is not None and num <= size]
        if not few:
            return []
        return [
            f"Only {' and '.join(few)} for {size:,} features: the covariance has not its full rank and "
            f"{self.name} is too high; compare it only with numbers of as many images."
        ]


class Kid(FeatureMetric):
    """The kernel distance of the same features."""

    name, label = "kid", "KID"
    spread = "std"
    real = ("features",)

    def __init__(self, protocol: Protocol, real: RealFeatures):
        super().__init__(protocol, real)
        self.description = f"squared kernel distance of {real.network.description}"
        size = kid_subset_size(protocol.num_prompts, len(real.features))
        self.spread_text = f"mean of {KID_SUBSETS} subsets of {size:,}, ± {{column}} their standard deviation"

    def measure(self, drawn: Arrays, captions: Arrays) -> tuple[float, float]:
        """Mean and deviation over subsets."""
        return kid(drawn["features"], self.of.features, self.protocol.seed)


class OverlapMetric(FeatureMetric):
    """The share of either set that lies near the other; see `neighbours.Overlap`, which has a field of its name."""

    better = "higher"
    real = ("features",)
    meaning: str
    k: int

    def __init__(self, protocol: Protocol, real: RealFeatures):
        super().__init__(protocol, real)
        self.description = f"{self.meaning} ({self.k} neighbours), by {real.network.description}"
        self._num_least = min(protocol.num_prompts, len(real.features))

    def measure(self, drawn: Arrays, captions: Arrays) -> tuple[float, float]:
        """Computed once for all four; not a number where images have too few neighbours."""
        if self._num_least <= MOST_K:
            return float("nan"), float("nan")
        found: tuple[float, float] = getattr(self.of.neighbours.overlap(drawn["features"]), type(self).name)
        return found

    def remarks(self) -> list[str]:
        """Tells of too few images."""
        if self._num_least > MOST_K:
            return []
        return [f"{self.name} needs more than {MOST_K} images, drawn and real, and there are {self._num_least}."]


class Precision(OverlapMetric):
    """How many drawn images look like real ones."""

    name, label, k = "precision", "precision", PRECISION_K
    meaning = "share of drawn images within a real one's neighbourhood"
    spread_text = "95 % interval, ± {column} (of independent images)"


class Recall(OverlapMetric):
    """How many real images the model could have drawn."""

    name, label, k = "recall", "recall", PRECISION_K
    meaning = "share of real images within a drawn one's neighbourhood"
    spread_text = "95 % interval, ± {column} (grouped jackknife)"


class Density(OverlapMetric):
    """How crowded with real images the drawn ones' places are."""

    name, label, k = "density", "density", DENSITY_K
    meaning = "in how many real images' neighbourhoods a drawn one lies, over their number for a real one"
    spread_text = "95 % interval, ± {column} (of independent images)"


class Coverage(OverlapMetric):
    """How many real images have a drawn one near."""

    name, label, k = "coverage", "coverage", DENSITY_K
    meaning = "share of real images whose neighbourhood holds a drawn one"
    spread_text = "95 % interval, ± {column} (grouped jackknife)"


class Cmmd(Metric):
    """The kernel distance of CLIP's embeddings."""

    name, label, description = "cmmd", "CMMD", "kernel distance of CLIP's embeddings"
    drawn = real = ("clip",)

    def __init__(self, protocol: Protocol, real: Arrays | Gaussian):
        super().__init__(protocol, real)
        self._real = _images(real)["clip"]

    @classmethod
    def applies(cls, protocol: Protocol, has_images: bool) -> bool:
        """On request only: CLIP must then embed the real images too."""
        return protocol.cmmd

    def measure(self, drawn: Arrays, captions: Arrays) -> tuple[float, float]:
        """The distance from the real images."""
        return cmmd(drawn["clip"], self._real)


class PreferenceScore(Metric):
    """What a network trained on people's choices between images says of them."""

    name, label, better = "preference_score", "preference score", "higher"
    drawn = ("preference",)

    def __init__(self, protocol: Protocol, real: Arrays | Gaussian):
        super().__init__(protocol, real)
        self.description = f"predicted preference for the image, given its prompt, by {protocol.preference}"

    @classmethod
    def applies(cls, protocol: Protocol, has_images: bool) -> bool:
        """If the protocol names a network."""
        return protocol.preference is not None

    def measure(self, drawn: Arrays, captions: Arrays) -> tuple[float, float]:
        """The mean over the images."""
        return mean_of(drawn["preference"])


class ClipScore(Metric):
    """The agreement of images with their prompts."""

    name, better = "clip_score", "higher"
    drawn = captions = ("clip",)
    axis, label = "x", "CLIP score (cosine)"

    def __init__(self, protocol: Protocol, real: Arrays | Gaussian):
        super().__init__(protocol, real)
        self.description = f"cosine of image and prompt by CLIP {protocol.clip_model}"

    @classmethod
    def applies(cls, protocol: Protocol, has_images: bool) -> bool:
        """If CLIP compares images with prompts."""
        return protocol.agreement == "clip"

    def measure(self, drawn: Arrays, captions: Arrays) -> tuple[float, float]:
        """The mean over the images."""
        return mean_of(clip_scores(drawn["clip"], captions["clip"]))


METRICS: tuple[type[Metric], ...] = (Fid, Kid, Precision, Recall, Density, Coverage, Cmmd, ClipScore, PreferenceScore)
"""In the order of their columns."""


def metrics_for(protocol: Protocol, has_images: bool = True) -> list[type[Metric]]:
    """The protocol's metrics, a stand-in's last."""
    own = [stand_in(protocol.agreement).AGREEMENT] if protocol.agreement in STAND_INS else []
    return [metric for metric in (*METRICS, *own) if metric.applies(protocol, has_images)]


@dataclass(frozen=True)
class ImageArrays:
    """What is known of images: each network's features (n, d), and other arrays by name."""

    features: Mapping[str, NDArray[Any]]
    others: Arrays = field(default_factory=dict)


def open_metrics(protocol: Protocol, real: ImageArrays | Gaussian) -> list[Metric]:
    """The metrics, ready to measure against real images; of feature metrics one for each network.

    UserError for statistics of another network's features, or a metric that needs images and has statistics.
    """
    statistics = isinstance(real, Gaussian)
    of_networks = [
        RealFeatures(name, real if isinstance(real, Gaussian) else real.features[name]) for name in protocol.networks
    ]
    metrics: list[Metric] = []
    for metric in metrics_for(protocol, has_images=not statistics):
        per_network = issubclass(metric, FeatureMetric)
        given = of_networks if per_network else [real if isinstance(real, Gaussian) else real.others]
        metrics += [metric(protocol, each) for each in given]
    return metrics


def axes_of(protocol: Protocol, has_images: bool) -> dict[str, Axis]:
    """What the plot can show, by column: the guidance scale and each metric."""
    axes = [Axis("guidance_scale", "guidance scale")]
    networks = [feature_network(name) for name in protocol.networks]
    for metric in metrics_for(protocol, has_images):
        named = [(metric.name, metric.label)]
        if issubclass(metric, FeatureMetric):
            named = [metric.names(network) for network in networks]
        axes += [Axis(column, label, metric.better, metric.axis) for column, label in named]
    return {axis.column: axis for axis in axes}


def arrays_needed(protocol: Protocol, of: Literal["drawn", "real", "captions"]) -> set[str]:
    """Names of the arrays that the metrics of a protocol read."""
    return {name for metric in metrics_for(protocol) for name in getattr(metric, of)}


def numbers(metrics: Sequence[Metric], drawn: ImageArrays, captions: Arrays) -> dict[str, float | None]:
    """Each number and its spread, by column; None for what too few images do not tell."""
    found: dict[str, float] = {}
    for metric in metrics:
        arrays: Arrays = drawn.others
        if isinstance(metric, FeatureMetric):
            arrays = {**arrays, "features": drawn.features[metric.of.name]}
        found[metric.name], found[f"{metric.name}_{metric.spread}"] = metric.measure(arrays, captions)
    return {column: number if math.isfinite(number) else None for column, number in found.items()}


def descriptions(metrics: Sequence[Metric]) -> dict[str, str]:
    """Each metric in words, by name."""
    return {
        metric.name: f"{metric.description}; {metric.better} is better; "
        + metric.spread_text.format(column=f"{metric.name}_{metric.spread}")
        for metric in metrics
    }


def clip_scores(images: NDArray[Any], captions: NDArray[Any]) -> NDArray[np.float64]:
    """The cosine of each image with its prompt, (n,), from (n, e) embeddings of length 1.

    Scaled as in MLPerf's benchmark; torchmetrics multiplies it by 100 (Hessel et al. 2021, arXiv:2104.08718, by 2.5).
    """
    scores: NDArray[np.float64] = (images.astype(np.float64) * captions.astype(np.float64)).sum(axis=1)
    return scores


def mean_of(scores: NDArray[Any]) -> tuple[float, float]:
    """The mean of independent scores and half of its 95 % interval."""
    wide = scores.astype(np.float64)
    return float(wide.mean()), half_width_of_mean(wide)


def _images(real: Arrays | Gaussian) -> Arrays:
    if isinstance(real, Gaussian):
        raise UserError("CMMD compares images, and the reference is an .npz of statistics. Name the images.")
    return real
