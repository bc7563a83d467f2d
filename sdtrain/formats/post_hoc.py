"""Averages of any length, reconstructed after training from stored ones (EDM2: Karras et al. 2024, arXiv:2312.02696).

A power-function average at update t weighs the weights of time tau in proportion to tau^gamma, for tau up to t. Its
length sigma_rel is the standard deviation of that profile, relative to t. A run stores snapshots of a few lengths; the
combination of them whose profile comes nearest to a wanted one, by least squares, is the wanted average.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sdtrain.config.sections import LONGEST_AVERAGE
from sdtrain.errors import UserError
from sdtrain.formats.checkpoint import Checkpoint, average_name, find_checkpoint, finished, snapshots_of

_LARGEST_ERROR = 0.1


@dataclass(frozen=True)
class Profile:
    """A power-function average: its length sigma_rel, and the number of updates that it spans."""

    length: float
    num_updates: int

    @property
    def gamma(self) -> float:
        """The exponent."""
        return gamma_of(self.length)


@dataclass(frozen=True)
class Snapshot:
    """A stored average."""

    checkpoint: Checkpoint
    profile: Profile

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole fp32 parameters by name, one at a time."""
        return self.checkpoint.weights(average_name(self.profile.length))


def gamma_of(length: float) -> float:
    """The exponent of a length: the root of eq. (4), sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Lengths are above 0 and below 1 / sqrt(12), that of the plain mean, where gamma is 0.
    """
    inverse = length**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def decay_of(num_updates: int, gamma: float) -> float:
    """Decay of update `num_updates`, from 1: (1 - 1/t)^(gamma + 1), eq. (2) and (3)."""
    return float((1.0 - 1.0 / num_updates) ** (gamma + 1.0))


def combination(stored: Sequence[Profile], wanted: Profile) -> tuple[NDArray[np.float64], float]:
    """Coefficients of stored averages whose sum is nearest to a wanted one, and the error that remains.

    Solves the least-squares system of appendix C.2; the error is of the profiles, in their L2 norm, relative to the
    wanted one's.
    """
    gram = np.array([[_inner(a, b) for b in stored] for a in stored])
    against = np.array([_inner(a, wanted) for a in stored])
    coefficients: NDArray[np.float64] = np.linalg.lstsq(gram, against, rcond=1e-12)[0]
    norm = _inner(wanted, wanted)
    squared = norm - 2 * coefficients @ against + coefficients @ gram @ coefficients
    return coefficients, math.sqrt(max(0.0, float(squared)) / norm)


def _inner(a: Profile, b: Profile) -> float:
    """Inner product of two profiles p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1), in logarithms, as t^gamma is large.

    The integral of tau^(gamma_a + gamma_b) up to the shorter of the two spans, of appendix C.2.
    """
    shorter = min(a.num_updates, b.num_updates)
    exponent = a.gamma + b.gamma + 1
    logarithm = exponent * math.log(shorter) - sum((p.gamma + 1) * math.log(p.num_updates) for p in (a, b))
    return (a.gamma + 1) * (b.gamma + 1) / exponent * math.exp(logarithm)


@dataclass(frozen=True)
class Reconstruction:
    """An average of a wanted length at the end of a checkpoint.

    Attributes:
        parts: snapshots and their coefficients.
        error: of its profile, relative.
    """

    parts: tuple[tuple[Snapshot, float], ...]
    error: float

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole parameters by name, fp32, one after another."""
        coefficients = [coefficient for _, coefficient in self.parts]
        for stored in zip(*(snapshot.weights() for snapshot, _ in self.parts), strict=True):
            parts = (factor * tensor.double() for factor, (_, tensor) in zip(coefficients, stored, strict=True))
            yield stored[0][0], sum(parts, torch.zeros((), dtype=torch.float64)).float()


def reconstruct(path: Path, length: float) -> Reconstruction:
    """The average of a length at a run's newest checkpoint, or at the checkpoint `path`.

    Raises:
        UserError: the run stored no averages; no length; the stored ones cannot give it.
    """
    if not 0 < length <= LONGEST_AVERAGE:
        raise UserError(f"The length of an average is above 0 and at most {LONGEST_AVERAGE}, not {length:g}.")
    checkpoint = find_checkpoint(path)
    run = checkpoint.path.parents[1]
    stored = _stored(run, checkpoint)
    if not stored:
        raise UserError(
            f"{run} stored no averages to make others from. A run does so with `ema: {{post_hoc: [0.05, 0.1]}}`, from "
            "its beginning."
        )
    wanted = Profile(length, checkpoint.layout.num_applied)
    coefficients, error = combination([snapshot.profile for snapshot in stored], wanted)
    if error > _LARGEST_ERROR:
        raise UserError(
            f"The {len(stored)} averages that {run} stored give no average of length {length:g}: the profile would be "
            f"{error:.0%} off. Choose a length nearer to theirs, "
            f"{', '.join(f'{found:g}' for found in sorted({snapshot.profile.length for snapshot in stored}))}."
        )
    return Reconstruction(tuple(zip(stored, coefficients.tolist(), strict=True)), error)


def _stored(run: Path, checkpoint: Checkpoint) -> list[Snapshot]:
    """The whole snapshots up to a checkpoint, oldest first."""
    found = []
    for path in reversed(finished(snapshots_of(run))):
        snapshot = Checkpoint(path)
        if snapshot.layout.step > checkpoint.layout.step:
            break
        if not snapshot.holds(checkpoint.layout.parameters):
            raise UserError(f"{path} holds another UNet than {checkpoint.path}. Delete it.")
        snapshot.verify()
        profiles = (Profile(length, snapshot.layout.num_applied) for length in snapshot.layout.post_hoc)
        found += [Snapshot(snapshot, profile) for profile in profiles]
    return found
