"""The numbers of one model at one guidance scale, each with its spread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
from sdtrain.evaluation.networks import NUM_FEATURES
from sdtrain.evaluation.protocol import Protocol

Arrays = Mapping[str, NDArray[Any]]
_INTERVAL = "95 % interval, ± {name}_ci95"


@dataclass(frozen=True)
class Names:
    """What the numbers are called: those of the demo's networks say that they are the demo's."""

    fid: str
    kid: str
    agreement: str | None
    cmmd: str | None

    @staticmethod
    def of(protocol: Protocol) -> Names:
        """The names for a protocol."""
        demo = "_demo_features" if protocol.network == "demo" else ""
        agreement = {"clip": "clip_score", "demo": "agreement_demo_checker", "none": None}[protocol.agreement]
        return Names(f"fid{demo}", f"kid{demo}", agreement, "cmmd" if protocol.cmmd else None)


class Judge:
    """Compares drawn images with one reference and with their prompts.

    Args:
        protocol: which numbers are wanted.
        reference: `features` (m, d) and perhaps `clip` (m, e) of real images; or statistics, which give no KID and no
            CMMD.

    Raises:
        UserError: the statistics are of another network's features, or CMMD is wanted, which needs images.
    """

    def __init__(self, protocol: Protocol, reference: Arrays | Gaussian):
        self.names, self._protocol = Names.of(protocol), protocol
        self._real = None if isinstance(reference, Gaussian) else reference
        if protocol.cmmd and self._real is None:
            raise UserError("CMMD compares images, and the reference is an .npz of statistics. Name the images.")
        gaussian = reference if isinstance(reference, Gaussian) else gaussian_of(reference["features"])
        found, size = len(gaussian.mean), NUM_FEATURES[protocol.network]
        if found != size:
            raise UserError(
                f"The reference's statistics are of {found} features, and network '{protocol.network}' gives {size}. "
                "Name statistics made with this network, or the images themselves."
            )
        self._frechet = FrechetDistance(gaussian)

    @property
    def reference(self) -> Gaussian:
        """Mean and covariance of the real images' features."""
        return self._frechet.reference

    def numbers(self, drawn: Arrays, captions: Arrays | None) -> dict[str, float]:
        """Each number and its spread by name.

        Args:
            drawn: `features` (n, d), and `clip` (n, e) or `shown` (n,), as the protocol wants.
            captions: `clip` (n, e) of the prompts.
        """
        features, names = drawn["features"], self.names
        found = {names.fid: self._frechet.to(gaussian_of(features))}
        found[f"{names.fid}_ci95"] = self._frechet.spread(features)
        if self._real is not None:
            found[names.kid], found[f"{names.kid}_std"] = kid(features, self._real["features"], self._protocol.seed)
        if names.cmmd and self._real is not None:
            found["cmmd"], found["cmmd_ci95"] = cmmd(drawn["clip"], self._real["clip"])
        if names.agreement:
            scores = clip_scores(drawn["clip"], captions["clip"]) if captions else drawn["shown"].astype(np.float64)
            found[names.agreement] = float(scores.mean())
            found[f"{names.agreement}_ci95"] = half_width_of_mean(scores)
        return found

    def descriptions(self) -> dict[str, str]:
        """What each number is, in words."""
        names, protocol = self.names, self._protocol
        by = "Inception's 2048 pooled features"
        if protocol.network == "demo":
            by = f"{NUM_FEATURES['demo']} features of the demo's own tiny autoencoder, comparable with nothing else"
        interval = f"{_INTERVAL.format(name=names.fid)} (grouped jackknife)"
        texts = {names.fid: f"Fréchet distance of {by}; lower is better; {interval}"}
        if self._real is not None:
            size = kid_subset_size(protocol.num_prompts, len(self._real["features"]))
            subsets = f"mean of {KID_SUBSETS} subsets of {size:,}, ± {names.kid}_std their standard deviation"
            texts[names.kid] = f"squared kernel distance of the same features; lower is better; {subsets}"
        if names.agreement:
            how = (
                f"cosine of image and prompt by CLIP {protocol.clip_model}"
                if protocol.agreement == "clip"
                else "share of named colours and shapes that the demo's checker sees; not a CLIP score"
            )
            texts[names.agreement] = f"{how}; higher is better; {_INTERVAL.format(name=names.agreement)}"
        if names.cmmd:
            texts["cmmd"] = f"kernel distance of CLIP's embeddings; lower is better; {_INTERVAL.format(name='cmmd')}"
        return texts

    def notes(self) -> list[str]:
        """What a reader has to know about these numbers."""
        size, num = len(self.reference.mean), self._protocol.num_prompts
        sets = {"images were drawn": num, "real images were taken": self.reference.num}
        few = [f"{n:,} {which}" for which, n in sets.items() if n is not None and n <= size]
        if not few:
            return []
        return [
            f"Only {' and '.join(few)} for {size:,} features: the covariance has not its full rank and "
            f"{self.names.fid} is too high; compare it only with numbers of as many images."
        ]


def clip_scores(images: NDArray[Any], captions: NDArray[Any]) -> NDArray[np.float64]:
    """The cosine of each image with its prompt, (n,), from (n, e) embeddings of length 1.

    As MLPerf's benchmark gives it; torchmetrics multiplies it by 100 (Hessel et al. 2021, arXiv:2104.08718, by 2.5).
    """
    scores: NDArray[np.float64] = (images.astype(np.float64) * captions.astype(np.float64)).sum(axis=1)
    return scores
