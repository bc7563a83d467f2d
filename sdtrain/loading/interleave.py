"""Taking turns in exact proportions: which of several streams each position draws from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
SHARES = 2**20


def draw(positions: Ints, shares: Sequence[int]) -> tuple[Ints, Ints]:
    """Which stream each position draws from, and how often that stream was drawn from before.

    The first stream takes the positions p where floor((p + 1) a / n) exceeds floor(p a / n), for its share a of n
    (Bresenham's line); the others share what is left in the same way. So of the first p positions, stream i has
    p * shares[i] / n, give or take less than the number of streams, for every p: nothing is left to chance.

    Args:
        positions: from 0.
        shares: integers, one for each stream, with a sum below 2**31.

    Returns:
        Streams and places within their streams, in the shape of `positions`.
    """
    streams = np.full_like(positions, len(shares) - 1)
    places, left, total = positions.copy(), np.ones(len(positions), bool), sum(shares)
    for stream, share in enumerate(shares[:-1]):
        before, after = _taken(places, share, total), _taken(places + 1, share, total)
        mine = left & (after > before)
        streams[mine] = stream
        places = np.where(mine, before, np.where(left, places - before, places))
        left &= ~mine
        total -= share
    return streams, places


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Weights as integers that sum to about 2**20, none of them 0."""
    total = sum(weights)
    return [max(1, round(SHARES * weight / total)) for weight in weights]


def _taken(positions: Ints, share: int, total: int) -> Ints:
    """floor(position * share / total), without the product, which could pass 2**63."""
    turns, rest = np.divmod(positions, total)
    return turns * share + rest * share // total
