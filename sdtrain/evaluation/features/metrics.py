"""The metrics of two sets of features: Fréchet and kernel distance, precision, recall, density and coverage."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from sdtrain.errors import UserError
from sdtrain.evaluation.distances import KID_SUBSETS, FrechetDistance, Gaussian, gaussian_of, kid, kid_subset_size
from sdtrain.evaluation.features.neighbours import DENSITY_K, MOST_K, PRECISION_K, RealNeighbours
from sdtrain.evaluation.metric import Arrays, Metric
from sdtrain.evaluation.networks import FeatureNetwork, feature_network
from sdtrain.evaluation.protocol import Protocol


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
        """FID is Inception's; of other features it has another name."""
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
