from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.dedup import ordering
from filters.dedup.ordering import Rows, divide_rows, in_threads

WORDS = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2, 2**63, 2**64 - 2, 2**64 - 1])


def rows_of(first: list[int], second: list[int]) -> Rows:
    return Rows(np.arange(len(first)), np.array(first, np.uint64), np.array(second, np.uint64))


@given(st.lists(st.tuples(WORDS, st.integers(0, 2)), max_size=40))
def test_rows_come_in_the_order_of_both_words_and_then_as_they_came(words):
    rows = rows_of([first for first, _ in words], [second for _, second in words])
    expected = sorted((*pair, i) for i, pair in enumerate(words))
    found = rows.in_order()
    assert list(zip(*(values.tolist() for values in (found.first, found.second, found.nodes)), strict=True)) == expected


@given(st.lists(st.tuples(st.sampled_from([0, 1, 5, 2**64 - 1]), st.integers(0, 3)), max_size=30))
def test_what_is_repeated_has_all_rows_that_equal_another(words):
    rows = rows_of([first for first, _ in words], [second for _, second in words])
    found = rows.repeated()
    starts = found.starts_of_runs()
    runs = np.split(found.nodes, np.flatnonzero(starts)[1:]) if len(starts) else []
    expected = [[i for i, pair in enumerate(words) if pair == this] for this in sorted(set(words))]
    assert [run.tolist() for run in runs if len(run) > 1] == [nodes for nodes in expected if len(nodes) > 1]


def test_what_few_rows_repeat_is_all_that_comes():
    words = np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64)
    words[4000:4010] = words[:10]
    assert len(Rows(np.arange(5000), words, words).repeated().nodes) == 20


@pytest.mark.parametrize("skewed", [False, True])
def test_rows_divided_in_files_are_all_there_once_and_equal_words_share_a_part(tmp_path, monkeypatch, skewed):
    monkeypatch.setattr(ordering, "_ROWS_AT_ONCE", 100)
    rng = np.random.default_rng(1)
    first = rng.integers(0, 2**64, 1050, dtype=np.uint64)
    if skewed:
        first[rng.random(1050) < 0.6] = rng.choice([0, 7, 2**64 - 1])
    second = rng.integers(0, 2**64, 1050, dtype=np.uint64)
    parts = [part for part in divide_rows(first, second, tmp_path) if len(part.nodes)]
    assert len(parts) > 3
    nodes = np.concatenate([part.nodes for part in parts])
    assert sorted(nodes.tolist()) == list(range(1050))
    for part in parts:
        assert np.array_equal(part.first, first[part.nodes])
        assert np.array_equal(part.second, second[part.nodes])
        assert part.nodes.tolist() == sorted(part.nodes.tolist())
    assert all(one.first.max() < other.first.min() for one, other in pairwise(parts))
    in_order = np.concatenate([part.in_order().nodes for part in parts])
    assert np.array_equal(in_order, np.lexsort((second, first)))


def test_each_row_is_written_once_however_many_parts_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(ordering, "_ROWS_AT_ONCE", 16)
    words = np.random.default_rng(2).integers(0, 2**64, 4000, dtype=np.uint64)
    assert sum(len(part.nodes) for part in divide_rows(words, words, tmp_path)) == 4000
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 4000 * 24


def test_threads_keep_the_order_and_take_few_items_ahead():
    taken = []

    def items():
        for i in range(200):
            taken.append(i)
            yield i

    ahead = [len(taken) - result // 2 for result in in_threads(lambda i: 2 * i, items())]
    assert len(ahead) == 200
    assert max(ahead) <= len(ordering.os.sched_getaffinity(0)) + 1
