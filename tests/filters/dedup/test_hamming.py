import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.dedup import hamming
from filters.dedup.hamming import near_pairs, plan_tables
from tests.filters.dedup.duplicate_fixtures import close_hashes, planted_hashes


def found_pairs(hashes: np.ndarray, radius: int) -> list[tuple[int, int]]:
    """All that is found, as pairs of positions."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = [np.sort(np.stack(pair, axis=1), axis=1) for pair in near_pairs(hashes, radius, Path(folder))]
    pieces = [np.searchsorted(hashes, pair) for pair in pairs]
    return sorted((int(i), int(j)) for i, j in np.concatenate([np.empty((0, 2), int), *pieces]))


def brute_force(hashes: np.ndarray, radius: int) -> list[tuple[int, int]]:
    found = []
    for start in range(0, len(hashes), 1000):
        rows = np.bitwise_count(hashes[start : start + 1000, None] ^ hashes[None, :]) <= radius
        found += [(int(i) + start, int(j)) for i, j in zip(*np.nonzero(rows), strict=True) if i + start < j]
    return found


@pytest.mark.parametrize("radius", [*range(7), 10, 16])
def test_no_pair_within_the_radius_is_missed_none_beyond_is_found_and_none_comes_twice(radius):
    hashes = np.unique(planted_hashes(5000, seed=radius))
    expected = brute_force(hashes, radius)
    assert len(expected) > 50 or radius == 0
    assert found_pairs(hashes, radius) == expected


def test_no_pair_of_twenty_thousand_hashes_is_missed():
    hashes = np.unique(planted_hashes(20_000, seed=1))
    expected = brute_force(hashes, 4)
    assert len(expected) > 1000
    assert found_pairs(hashes, 4) == expected


def test_parts_that_do_not_fit_into_memory_together_make_no_difference(monkeypatch):
    hashes = np.unique(planted_hashes(2000, seed=7))
    monkeypatch.setattr(hamming, "_ROWS_AT_ONCE", 100)
    monkeypatch.setattr(hamming, "_CHUNK_ROWS", 301)
    monkeypatch.setattr(hamming, "_ROWS_IN_CACHE", 17)
    assert found_pairs(hashes, 4) == brute_force(hashes, 4)


@given(st.sets(st.integers(0, 2**64 - 1), max_size=30), st.integers(1, 16), st.randoms(use_true_random=False))
def test_any_hashes_give_the_pairs_of_brute_force(numbers, radius, random):
    near = {number ^ (1 << random.randrange(64)) ^ (1 << random.randrange(64)) for number in numbers}
    hashes = np.array(sorted(numbers | near), np.uint64)
    expected = np.argwhere(np.triu(close_hashes(hashes, radius), 1))
    assert found_pairs(hashes, radius) == [tuple(pair) for pair in expected.tolist()]


def test_bits_that_are_moved_come_back():
    hashes = planted_hashes(1000, seed=2)
    for table in plan_tables(np.unique(hashes), 3):
        assert np.array_equal(table.restored(table.permuted(hashes)), hashes)


def test_more_hashes_get_longer_keys_so_that_candidates_do_not_grow_with_the_square():
    rng = np.random.default_rng(0)
    key_bits = [
        plan_tables(np.sort(rng.integers(0, 2**64, num, dtype=np.uint64)), 4)[0].key_bits for num in (4_000, 2_000_000)
    ]
    assert key_bits[0] < 16
    assert key_bits[1] > 20
