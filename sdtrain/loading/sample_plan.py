"""Computes the sample at each position of training, and its noise, as pure functions of (seed, step, sample).

Nothing is replayed: a run resumes in mid-epoch, on any number of ranks, with an undisturbed run's samples and noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count

import numpy as np
from numpy.typing import NDArray

from sdtrain.loading.order import Order

Ints = NDArray[np.int64]
SHARES = 2**20


@dataclass(frozen=True)
class SourcePlan:
    """One dataset of a plan, with one order per image size, in the order of the samples' numbers.

    `share` is its part of the positions, in proportion to the other sources' shares.
    """

    orders: tuple[Order, ...]
    share: int = 1

    @property
    def size(self) -> int:
        """Samples of all sizes."""
        return sum(order.size for order in self.orders)


@dataclass(frozen=True)
class SampleIndices:
    """The samples at some positions.

    They are numbers (B,) counted over all sources in turn, and epochs (B,): how often each was seen before.
    """

    indices: Ints
    epochs: Ints


@dataclass(frozen=True)
class Exposures:
    """The positions at which some samples are drawn, in order.

    `rows` (N,) number the samples in question, `positions` (N,) count from the start of training, and `epochs` (N,) how
    often the sample was seen before.
    """

    rows: Ints
    positions: Ints
    epochs: Ints


class SamplePlan:
    """The order of samples over all epochs, for optimizer steps of `global_batch_size`.

    Positions alternate between sources in proportion to their shares, and within a source between its sizes in
    proportion to their numbers (`interleave`). Each size of each source has its own endless stream of epochs, which
    hold every sample exactly once, in a different order. Each `group` of consecutive positions has one size. A group
    may straddle two epochs of its stream, so no sample is dropped or repeated, and at any time the sizes of one source
    are equally far on, give or take a group for each.
    """

    def __init__(self, sources: Sequence[SourcePlan], global_batch_size: int, group: int = 1) -> None:
        self._sources, self._global_batch_size, self._group = tuple(sources), global_batch_size, group
        self._firsts = [0, *accumulate(source.size for source in sources)]

    def batch(self, step: int) -> SampleIndices:
        """The samples of one optimizer step, whose batch may straddle two epochs."""
        first = step * self._global_batch_size
        return self.at(np.arange(first, first + self._global_batch_size, dtype=np.int64))

    def micro_batch(self, step: int, micro_step: int, rank: int, world_size: int, size: int) -> SampleIndices:
        """One rank's part of the step's batch in one micro-step, `size` samples."""
        first = step * self._global_batch_size + (micro_step * world_size + rank) * size
        return self.at(np.arange(first, first + size, dtype=np.int64))

    def stream_of(self, index: int) -> tuple[int, int]:
        """The first number, and the number, of the samples that share a sample's dataset and size."""
        first = 0
        for source in self._sources:
            for order in source.orders:
                if index < first + order.size:
                    return first, order.size
                first += order.size
        raise IndexError(index)

    @property
    def size(self) -> int:
        """Samples of all sources that are trained on."""
        return self._firsts[-1]

    def find(self, indices: Ints, end: int) -> Exposures:
        """All positions before `end` at which samples are drawn: the inverse of `at`, without replay.

        The work for a sample grows with its epochs before `end`, and with `BlockOrder` also with the shards; not with
        the samples or positions. IndexError for a number that no position draws.
        """
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.size:
            raise IndexError(f"the plan draws samples 0 to {self.size - 1} only")
        found = [Exposures(*np.empty((3, 0), np.int64))]
        streams = [(number, size) for number, source in enumerate(self._sources) for size in range(len(source.orders))]
        ends = np.cumsum([self._sources[number].orders[size].size for number, size in streams])
        stream_of = np.searchsorted(ends, indices, side="right")
        for stream in np.unique(stream_of).tolist():
            (rows,) = np.nonzero(stream_of == stream)
            (number, size), first = streams[stream], int(ends[stream - 1]) if stream else 0
            found += self._in_stream(number, size, rows, indices[rows] - first, end)
        rows, positions, epochs = map(
            np.concatenate, zip(*((e.rows, e.positions, e.epochs) for e in found), strict=True)
        )
        in_order = np.lexsort((positions, rows))
        return Exposures(rows[in_order], positions[in_order], epochs[in_order])

    def _in_stream(self, number: int, size: int, rows: Ints, samples: Ints, end: int) -> Iterator[Exposures]:
        """The exposures of samples of one size of one source, epoch by epoch."""
        order = self._sources[number].orders[size]
        for epoch in count():
            if int(self._positions(number, size, np.array([epoch * order.size]))[0]) >= end:
                return
            positions = self._positions(number, size, epoch * order.size + order.find(epoch, samples))
            here = positions < end
            yield Exposures(rows[here], positions[here], np.full(here.sum(), epoch, np.int64))

    def _positions(self, number: int, size: int, drawn: Ints) -> Ints:
        """The positions of the `drawn`-th samples, from 0, of the stream of one size of one source."""
        groups, inside = np.divmod(drawn, self._group)
        groups = position_of(groups, size, [order.size for order in self._sources[number].orders])
        return position_of(groups, number, [source.share for source in self._sources]) * self._group + inside

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
    """The stream that each position draws from, and how often that stream was drawn from before, in `positions`' shape.

    The first stream takes the positions p where floor((p + 1) a / n) exceeds floor(p a / n), for its share a of n
    (Bresenham's line); the others divide the rest in the same way. So of the first p positions, stream i has p *
    shares[i] / n, give or take less than the number of streams, for every p. Positions count from 0; shares are one
    integer per stream, with a sum below 2**31.
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


def position_of(within: Ints, stream: int, shares: Sequence[int]) -> Ints:
    """The inverse of `interleave`: the position at which a stream is drawn from after `within` times before.

    A stream's k-th position is ceil((k + 1) n / a) - 1, and the m-th of the rest floor(m n / (n - a)), from 0.
    """
    totals = list(accumulate(reversed(shares)))[::-1]
    positions = within
    if stream < len(shares) - 1:
        positions = -_taken(-(positions + 1), totals[stream], shares[stream]) - 1
    for share, total in zip(shares[:stream][::-1], totals[:stream][::-1], strict=True):
        positions = _taken(positions, total, total - share)
    return positions


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Weights as positive integers that sum to about 2**20."""
    total = sum(weights)
    return [max(1, round(SHARES * weight / total)) for weight in weights]


def _taken(positions: Ints, share: int, total: int) -> Ints:
    """floor(position * share / total), without the product, which could exceed 2**63."""
    turns, rest = np.divmod(positions, total)
    return turns * share + rest * share // total


@dataclass(frozen=True)
class SampleNoise:
    """All random numbers of one sample's training step."""

    timestep: int
    drop: float
    """Uniform in [0, 1); the caption is dropped if it is below the dropout."""
    posterior: NDArray[np.float32]
    """Standard normal, (4, h, w), for the VAE's posterior."""
    noise: NDArray[np.float32]
    """Standard normal, (4, h, w): added to the latent and to be predicted."""
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
    """The random numbers of one sample in one step, the same on every rank and in every split of the batch.

    Philox is counter-based, so a generator for each sample costs microseconds (Salmon et al., SC 2011). `num_timesteps`
    is the noise schedule's length; `shape` is (4, h, w); `into` are arrays for posterior and noise.
    """
    key = hashlib.blake2b(f"noise {seed} {step} {uid}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    posterior, noise = into or (np.empty(shape, np.float32), np.empty(shape, np.float32))
    timestep, drop = int(generator.integers(num_timesteps)), float(generator.random())
    generator.standard_normal(dtype=np.float32, out=posterior)
    generator.standard_normal(dtype=np.float32, out=noise)
    offset = generator.standard_normal((shape[0], 1, 1), np.float32)  # last, so that the others do not depend on it
    return SampleNoise(timestep, drop, posterior, noise, offset)
