"""The sample at each position of training, and its noise: pure functions of (seed, step, sample).

Nothing is replayed: the sample at any position is computed, so a run resumes in the middle of an epoch, on any
number of ranks, with the samples and the noise of an undisturbed run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from sdtrain.loading.order import Order

Ints = NDArray[np.int64]
SHARES = 2**20


@dataclass(frozen=True)
class SourcePlan:
    """One dataset of a plan.

    Attributes:
        orders: one for each size of image in it, in the order in which its samples are numbered.
        share: of the positions, in proportion to the other sources' shares.
    """

    orders: tuple[Order, ...]
    share: int = 1

    @property
    def size(self) -> int:
        """Samples of all sizes."""
        return sum(order.size for order in self.orders)


@dataclass(frozen=True)
class SampleIndices:
    """Samples at some positions.

    Attributes:
        indices: (B,), numbers of samples over all sources, one source after the other.
        epochs: (B,), how often the sample was seen before.
    """

    indices: Ints
    epochs: Ints


class SamplePlan:
    """The order of samples over all epochs.

    Positions take turns between the sources in the proportion of their shares, and within a source between its sizes
    in the proportion of their numbers (`interleave`). Each size of each source has its own endless stream:
    epoch after epoch, every sample exactly once per epoch, each in another order. `group` positions that follow each
    other are of one size. A group may straddle two epochs of its stream, so that nothing is left over: no sample is
    dropped or repeated, and at any time the sizes of one source have got equally far, give or take a group for each.

    Args:
        sources: the datasets.
        global_batch_size: samples in one optimizer step.
        group: consecutive positions that draw from one source and size.
    """

    def __init__(self, sources: Sequence[SourcePlan], global_batch_size: int, group: int = 1) -> None:
        self._sources, self._global_batch_size, self._group = tuple(sources), global_batch_size, group
        self._firsts = [0, *accumulate(source.size for source in sources)]

    def batch(self, step: int) -> SampleIndices:
        """The samples of one optimizer step; a batch may straddle two epochs."""
        first = step * self._global_batch_size
        return self.at(np.arange(first, first + self._global_batch_size, dtype=np.int64))

    def micro_batch(self, step: int, micro_step: int, rank: int, world_size: int, size: int) -> SampleIndices:
        """The part of the step's batch that one rank does in one micro-step, `size` samples."""
        first = step * self._global_batch_size + (micro_step * world_size + rank) * size
        return self.at(np.arange(first, first + size, dtype=np.int64))

    def stream_of(self, index: int) -> tuple[int, int]:
        """Of the samples that share dataset and size with one: the first one's number, and how many there are."""
        first = 0
        for source in self._sources:
            for order in source.orders:
                if index < first + order.size:
                    return first, order.size
                first += order.size
        raise IndexError(index)

    def at(self, positions: Ints) -> SampleIndices:
        """Samples at positions counted from the start of training."""
        groups, inside = np.divmod(positions, self._group)
        sources, within = interleave(groups, [source.share for source in self._sources])
        samples = SampleIndices(np.empty_like(positions), np.empty_like(positions))
        for number in np.unique(sources):
            here = sources == number
            first, orders = self._firsts[number], self._sources[number].orders
            samples.indices[here], samples.epochs[here] = self._in_source(orders, first, within[here], inside[here])
        return samples

    def _in_source(self, orders: Sequence[Order], first: int, groups: Ints, inside: Ints) -> tuple[Ints, Ints]:
        indices, epochs = np.empty_like(groups), np.empty_like(groups)
        sizes, within = interleave(groups, [order.size for order in orders])
        firsts = [first, *(first + end for end in accumulate(order.size for order in orders))]
        for number in np.unique(sizes):
            here, order = sizes == number, orders[number]
            epochs[here], offsets = np.divmod(within[here] * self._group + inside[here], order.size)
            indices[here] = firsts[number] + _over_epochs(order, epochs[here], offsets)
        return indices, epochs


def _over_epochs(order: Order, epochs: Ints, offsets: Ints) -> Ints:
    indices = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = order.at(int(epoch), offsets[here])
    return indices


def interleave(positions: Ints, shares: Sequence[int]) -> tuple[Ints, Ints]:
    """The stream that each position draws from, and how often that stream was drawn from before.

    The first stream takes the positions p where floor((p + 1) a / n) exceeds floor(p a / n), for its share a of n
    (Bresenham's line); the others share what is left in the same way. So of the first p positions, stream i has
    p * shares[i] / n, give or take less than the number of streams, for every p.

    Args:
        positions: from 0.
        shares: integers, one for each stream, with a sum below 2**31.

    Returns:
        Streams, and positions within them, in the shape of `positions`.
    """
    streams = np.full_like(positions, len(shares) - 1)
    within, left, total = positions.copy(), np.ones(len(positions), bool), sum(shares)
    for stream, share in enumerate(shares[:-1]):
        before, after = _taken(within, share, total), _taken(within + 1, share, total)
        mine = left & (after > before)
        streams[mine] = stream
        within = np.where(mine, before, np.where(left, within - before, within))
        left &= ~mine
        total -= share
    return streams, within


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Weights as integers that sum to about 2**20, none of them 0."""
    total = sum(weights)
    return [max(1, round(SHARES * weight / total)) for weight in weights]


def _taken(positions: Ints, share: int, total: int) -> Ints:
    """floor(position * share / total), without the product, which could pass 2**63."""
    turns, rest = np.divmod(positions, total)
    return turns * share + rest * share // total


@dataclass(frozen=True)
class SampleNoise:
    """All random numbers of one sample's training step."""

    timestep: int
    drop: float
    """Uniform in [0, 1); the caption is dropped where this is below the dropout."""
    posterior: NDArray[np.float32]
    """Standard normal, (4, h, w): which latent the VAE's posterior gives."""
    noise: NDArray[np.float32]
    """Standard normal, (4, h, w): what is added to the latent and has to be predicted."""
    offset: NDArray[np.float32]
    """Standard normal, (4, 1, 1): the constant part of offset noise."""


def sample_noise(
    seed: int,
    step: int,
    uid: str,
    num_timesteps: int,
    shape: tuple[int, int, int],
    into: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
) -> SampleNoise:
    """The random numbers of one sample in one step: the same on every rank and in every split of the batch.

    Philox is counter-based, so a generator for each sample costs microseconds (Salmon et al., SC 2011).

    Args:
        seed: of the run.
        step: optimizer step.
        uid: the sample's identity.
        num_timesteps: length of the noise schedule.
        shape: (4, h, w).
        into: arrays for posterior and noise; made here if not given.
    """
    key = hashlib.blake2b(f"noise {seed} {step} {uid}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    posterior, noise = into or (np.empty(shape, np.float32), np.empty(shape, np.float32))
    timestep, drop = int(generator.integers(num_timesteps)), float(generator.random())
    generator.standard_normal(dtype=np.float32, out=posterior)
    generator.standard_normal(dtype=np.float32, out=noise)
    offset = generator.standard_normal((shape[0], 1, 1), np.float32)  # last, so that it shifts none of the others
    return SampleNoise(timestep, drop, posterior, noise, offset)
