"""The metrics of one model at one guidance scale, each with its description."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sdtrain.errors import UserError
from sdtrain.evaluation.distances import Gaussian, cmmd, half_width_of_mean
from sdtrain.evaluation.features.metrics import (
    Coverage,
    Density,
    FeatureMetric,
    Fid,
    Kid,
    Precision,
    RealFeatures,
    Recall,
)
from sdtrain.evaluation.metric import Arrays, Metric
from sdtrain.evaluation.networks import feature_network, stand_in
from sdtrain.evaluation.protocol import STAND_INS, Protocol
from sdtrain.evaluation.results import Axis


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
