import numpy as np
import pytest

from filters.contamination import near_hashes
from filters.contamination.near_hashes import NearHashes
from tests.filters.dedup.duplicate_fixtures import planted_hashes


def pairs(given, block, radius):
    rows, items = NearHashes(given, radius).matches(block)
    return sorted(zip(rows.tolist(), items.tolist(), strict=True))


@pytest.mark.parametrize("radius", [0, 1, 4, 8])
def test_every_pair_within_the_radius_is_found_once_and_no_other(radius):
    hashes = planted_hashes(3000, seed=radius)
    rng = np.random.default_rng(radius)
    given, block = rng.permutation(hashes)[:300], np.concatenate([hashes, hashes[:50]])
    expected = np.nonzero(np.bitwise_count(block[:, None] ^ given[None, :]) <= radius)
    assert len(expected[0]) >= 300
    assert pairs(given, block, radius) == sorted(zip(*(part.tolist() for part in expected), strict=True))


def test_pieces_of_any_size_give_the_same_pairs(monkeypatch):
    hashes = planted_hashes(1000, seed=3)
    whole = pairs(hashes, hashes, 4)
    monkeypatch.setattr(near_hashes, "_PAIRS_AT_ONCE", 7)
    assert pairs(hashes, hashes, 4) == whole


def test_one_hash_or_none_may_be_given_and_any_block_may_be_empty():
    one, none = np.array([5], np.uint64), np.array([], np.uint64)
    assert pairs(one, np.array([4, 5, 255, 5], np.uint64), 4) == [(0, 0), (1, 0), (3, 0)]
    assert pairs(none, one, 4) == pairs(one, none, 4) == []
