"""Signatures of miniatures: 128 bits a plane, nearly equal for an altered copy, also if it is mirrored or cropped.

A bit is the sign of a random projection of a plane's low frequencies, so two planes differ in a share of bits that is
their angle divided by pi (Charikar, "Similarity estimation techniques from rounding algorithms", STOC 2002). Cropping
and mirroring are linear too: the signature of an image's mirror image or centre is another projection of its own plane.
Projections are sums of integers below 2^24, exact in float32 in any order, so that no bit depends on the machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sdtrain.images.miniature import CHROMA_SIDE, EXTREME_SIDE, Planes
from sdtrain.mixing import mix64

SIGNATURE_BYTES = 16
_BITS = 8 * SIGNATURE_BYTES
_MAX_WEIGHT = 127
# Frequencies per axis, and the power of the frequency that makes them about equally strong in photographs.
_LUMA_FREQUENCIES, _CHROMA_FREQUENCIES, _WHITENING = 6, 4, 0.5
_CHROMA_MEAN_WEIGHT = 0.5
_CENTER = 0.95  # of each side: the centre that a copy cropped by 5 % shows
# Planes flatter than this many levels (standard deviation, for colours distance from gray) have no signature.
_LEAST_LEVELS = 3

Signatures = NDArray[np.uint8]
Weights = NDArray[np.float32]


@dataclass(frozen=True)
class PlaneSignatures:
    """Signatures of one plane of N miniatures.

    Attributes:
        plane: its name.
        known: whether the plane has enough structure for a signature, (N,).
        whole: of the plane, (N, 16).
        mirrored: of its mirror image, (N, 16).
        center: of its centre, which a cropped copy shows, (N, 16); only for the mean brightness.
    """

    plane: str
    known: NDArray[np.bool_]
    whole: Signatures
    mirrored: Signatures
    center: Signatures | None = None


def signatures_of(planes: Planes) -> Iterator[PlaneSignatures]:
    """Yields the signatures of each plane; takes about 15 microseconds of a core per miniature."""
    luma = planes.luma.reshape(len(planes.luma), EXTREME_SIDE, 2, EXTREME_SIDE, 2).astype(np.float32).sum((2, 4)) // 4
    for name, plane in (("luma", luma), ("dark", planes.dark), ("bright", planes.bright)):
        values = plane[:, None].astype(np.float32)
        whole, mirrored = _both(values, _luma_weights())
        known = values.reshape(len(values), -1).std(axis=1) >= _LEAST_LEVELS
        center = _signs(values.reshape(len(values), -1) @ _center_weights()) if name == "luma" else None
        yield PlaneSignatures(name, known, whole, mirrored, center)
    values = planes.chroma.astype(np.float32) - 128
    known = np.square(values).mean(axis=(1, 2, 3)) >= _LEAST_LEVELS**2
    yield PlaneSignatures("chroma", known, *_both(values, _chroma_weights()))


def _both(values: NDArray[np.float32], weights: Weights) -> tuple[Signatures, Signatures]:
    """Returns the signatures of planes (N, C, H, W) and of their mirror images.

    The even and the odd parts about the vertical axis are projected once: their sum is the one, their difference the
    other.
    """
    half = values.shape[-1] // 2
    left, right = values[..., :half], values[..., : half - 1 : -1]
    shaped = weights.reshape(*values.shape[1:], _BITS)
    near, far = shaped[..., :half, :], shaped[..., : half - 1 : -1, :]
    even = (left + right).reshape(len(values), -1) @ (near + far).reshape(-1, _BITS)
    odd = (left - right).reshape(len(values), -1) @ (near - far).reshape(-1, _BITS)
    return _signs(even + odd), _signs(even - odd)


def _signs(projections: NDArray[np.float32]) -> Signatures:
    return np.packbits(projections > 0, axis=1)


@lru_cache
def _luma_weights() -> Weights:
    return _without_mean(_integers(_random_mixture(EXTREME_SIDE, _LUMA_FREQUENCIES, 1, 0.0)))


@lru_cache
def _center_weights() -> Weights:
    inner = _center_samples(EXTREME_SIDE)
    whole = _random_mixture(EXTREME_SIDE, _LUMA_FREQUENCIES, 1, 0.0).reshape(EXTREME_SIDE, EXTREME_SIDE, _BITS)
    return _without_mean(_integers(np.einsum("ij,kl,ikb->jlb", inner, inner, whole).reshape(-1, _BITS)))


@lru_cache
def _chroma_weights() -> Weights:
    return _integers(_random_mixture(CHROMA_SIDE, _CHROMA_FREQUENCIES, 2, _CHROMA_MEAN_WEIGHT))


def _random_mixture(side: int, num_frequencies: int, num_channels: int, mean_weight: float) -> NDArray[np.float64]:
    """Returns (C * side * side, 128): in each column, all low frequencies with random signs."""
    frequency, position = np.arange(num_frequencies)[:, None], np.arange(side)[None, :]
    cosines = np.cos(np.pi * frequency * (2 * position + 1) / (2 * side)) * np.where(frequency, np.sqrt(2), 1)
    radius = np.hypot(*np.meshgrid(np.arange(num_frequencies), np.arange(num_frequencies)))
    scale = np.where(radius > num_frequencies - 0.5, 0, np.maximum(radius, 1) ** _WHITENING)
    scale[0, 0] = mean_weight
    num = num_channels * num_frequencies**2 * _BITS
    signs = np.where(mix64(np.arange(1, num + 1, dtype=np.uint64)) >> np.uint64(63), 1.0, -1.0)
    mixed = signs.reshape(num_channels, num_frequencies, num_frequencies, _BITS) * scale[..., None]
    return np.einsum("cuvb,ui,vj->cijb", mixed, cosines, cosines, optimize=True).reshape(-1, _BITS)


def _integers(weights: NDArray[np.float64]) -> Weights:
    rounded: Weights = np.round(weights * (_MAX_WEIGHT / np.abs(weights).max(axis=0))).astype(np.float32)
    return rounded


def _without_mean(weights: Weights) -> Weights:
    """Takes the sum of each column, which rounding left, off its first weights: brightness does not count."""
    balanced = weights.copy()
    for column in balanced.T:
        rest = int(column.sum())
        column[np.flatnonzero(np.abs(column) < _MAX_WEIGHT)[: abs(rest)]] -= np.sign(rest)
    return balanced


def _center_samples(side: int) -> NDArray[np.float64]:
    """Returns (side, side): a line's centre, sampled at as many points by linear interpolation."""
    positions = ((np.arange(side) + 0.5) / side - 0.5) * _CENTER * side + side / 2 - 0.5
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(side)[None, :]))
