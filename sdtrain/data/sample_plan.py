"""Which sample is seen when, and with which noise: pure functions of (seed, step, sample).

Nothing is replayed: the sample at any position is computed, so a run resumes in the middle of an epoch, on any
number of ranks, with the samples and the noise of an undisturbed run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class SamplePlan:
    """The order of `num_samples` samples over all epochs: each exactly once per epoch, shuffled anew every epoch."""

    num_samples: int
    global_batch_size: int
    seed: int

    def batch(self, step: int) -> NDArray[np.int64]:
        """Sample indices of one optimizer step, (global_batch_size,); a batch may straddle two epochs."""
        first = step * self.global_batch_size
        return self.at(np.arange(first, first + self.global_batch_size, dtype=np.int64))

    def micro_batch(self, step: int, micro_step: int, rank: int, world_size: int, size: int) -> NDArray[np.int64]:
        """The part of the step's batch that one rank does in one micro-step, (size,)."""
        first = (micro_step * world_size + rank) * size
        return self.batch(step)[first : first + size]

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample indices at positions counted from the start of training."""
        epochs, offsets = np.divmod(positions, self.num_samples)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = permute(offsets[here], self.num_samples, _key(self.seed, int(epoch)))
        return indices


def permute(offsets: NDArray[np.int64], size: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Image of each offset in [0, size) under a pseudo-random permutation of [0, size).

    A Feistel network permutes the next power of four; what falls outside [0, size) walks on along its cycle until
    it is inside (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    values = _feistel(offsets.astype(np.uint64), half_bits, key)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half_bits, key)
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half_bits: np.uint64, key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for round_key in key:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << half_bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scrambles 64-bit integers; the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLIERS[0]
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLIERS[1]
    return values ^ (values >> np.uint64(31))


def _key(seed: int, epoch: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"order {seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, "<u8")


@dataclass(frozen=True)
class SampleNoise:
    """All chance in one sample's training step."""

    timestep: int
    drop: float
    """Uniform in [0, 1); the caption is dropped where this is below the dropout."""
    posterior: NDArray[np.float32]
    """Standard normal, (4, h, w): which latent the VAE's posterior gives."""
    noise: NDArray[np.float32]
    """Standard normal, (4, h, w): what is added to the latent and has to be predicted."""


def sample_noise(seed: int, step: int, uid: str, num_timesteps: int, shape: tuple[int, int, int]) -> SampleNoise:
    """The chance of one sample in one step: the same on every rank and in every split of the batch.

    Philox is counter-based, so a generator for each sample costs microseconds (Salmon et al., SC 2011).
    """
    key = hashlib.blake2b(f"noise {seed} {step} {uid}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return SampleNoise(
        timestep=int(generator.integers(num_timesteps)),
        drop=float(generator.random()),
        posterior=generator.standard_normal(shape, np.float32),
        noise=generator.standard_normal(shape, np.float32),
    )
