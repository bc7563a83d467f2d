import numpy as np
import pytest

from sdtrain.evaluation import kernels
from sdtrain.evaluation.jackknife import grouped, half_width_of_mean
from sdtrain.evaluation.kernels import cmmd, kid, kid_subset_size, unbiased_mmd


def drawn(seed, num, size, shift=0.0):
    return np.random.default_rng(seed).standard_normal((num, size)) + shift


def unit(values):
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_the_discrepancy_is_its_definition_pair_by_pair():
    x, y = drawn(0, 7, 3), drawn(1, 5, 3, 0.5)

    def kernel(a, b):
        return (float(np.dot(a, b)) / 3 + 1) ** 3

    within = sum(kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (7 * 6)
    within += sum(kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (5 * 4)
    across = sum(kernel(a, b) for a in x for b in y) / 35
    assert unbiased_mmd(x, y) == pytest.approx(within - 2 * across, rel=1e-12)


def test_kid_of_one_distribution_is_0_on_average_and_grows_with_a_shift():
    same = [kid(drawn(s, 200, 16), drawn(s + 100, 200, 16), num_subsets=10) for s in range(8)]
    assert abs(np.mean([mean for mean, _ in same])) < 3 * np.std([mean for mean, _ in same], ddof=1) / 8**0.5
    near, far = (kid(drawn(0, 200, 16, shift), drawn(1, 200, 16), num_subsets=10)[0] for shift in (0.3, 0.6))
    assert 0 < near < far


def test_the_subsets_are_the_seeds():
    x, y = drawn(0, 100, 4), drawn(1, 90, 4)
    assert kid(x, y, seed=3, num_subsets=5) == kid(x, y, seed=3, num_subsets=5)
    assert kid(x, y, seed=3, num_subsets=5) != kid(x, y, seed=4, num_subsets=5)


def test_small_sets_have_smaller_subsets_that_still_differ():
    assert kid_subset_size(10_000, 5_000) == 1000
    assert kid_subset_size(300, 90) == 45
    assert kid(drawn(0, 40, 4), drawn(1, 40, 4))[1] > 0


def test_cmmd_is_its_definition_pair_by_pair():
    x, y = unit(drawn(0, 9, 5)), unit(drawn(1, 6, 5, 0.4))

    def mean_kernel(a, b):
        return np.mean([np.exp(-np.square(p - q).sum() / 200) for p in a for q in b])

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert cmmd(x, y)[0] == pytest.approx(expected, rel=1e-9)
    assert cmmd(x, x)[0] == pytest.approx(0, abs=1e-9)


def test_cmmd_is_the_same_in_whatever_pieces_it_is_summed(monkeypatch):
    x, y = unit(drawn(0, 50, 5)), unit(drawn(1, 30, 5))
    whole = cmmd(x, y)
    monkeypatch.setattr(kernels, "_ROWS_AT_ONCE", 7)
    assert cmmd(x, y) == pytest.approx(whole, rel=1e-9)


def test_groups_hold_each_number_once():
    assert sorted(np.concatenate(grouped(23)).tolist()) == list(range(23))
    assert len(grouped(23)) == 10
    assert len(grouped(3)) == 3


def test_the_interval_of_a_mean_holds_the_truth_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    sets = rng.standard_normal((1000, 200))
    inside = [abs(values.mean()) <= half_width_of_mean(values) for values in sets]
    assert 0.92 < np.mean(inside) < 0.98
