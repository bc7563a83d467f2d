import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from sdtrain.evaluation import distances
from sdtrain.evaluation.distances import (
    FrechetDistance,
    Gaussian,
    cmmd,
    gaussian_of,
    grouped,
    half_width_of_mean,
    kid,
    kid_subset_size,
    unbiased_mmd,
)


def features(seed, num, size, scale=1.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num, size)) @ (scale * rng.standard_normal((size, size))) + rng.standard_normal(size)


def by_matrix_root(a, b):
    """The distance as it is usually computed, with SciPy's root of the product."""
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    return np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance - 2 * root)


def test_two_gaussians_that_vary_along_the_axes_have_the_closed_form():
    mean, other = np.array([0.0, 1.0, -2.0]), np.array([3.0, 1.0, -1.0])
    deviations, others = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 0.5])
    found = FrechetDistance(Gaussian(mean, np.diag(deviations**2))).to(Gaussian(other, np.diag(others**2)))
    assert found == pytest.approx(np.square(mean - other).sum() + np.square(deviations - others).sum(), rel=1e-12)


def test_the_matrix_root_of_scipy_gives_the_same_on_the_same_features():
    a, b = gaussian_of(features(0, 500, 40)), gaussian_of(features(1, 300, 40, 0.7))
    assert FrechetDistance(a).to(b) == pytest.approx(by_matrix_root(a, b), rel=1e-9)


def test_frechet_and_kid_are_torch_fidelitys_on_the_same_features():
    """KID in one subset of all, as its subsets are drawn by another generator; ours are half a set at most."""
    a, b = (features(seed, 150, 24, scale).astype(np.float32) for seed, scale in ((0, 1.0), (1, 1.3)))
    statistics = [fid_features_to_statistics(torch.from_numpy(each).double()) for each in (a, b)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert FrechetDistance(gaussian_of(b)).to(gaussian_of(a)) == pytest.approx(expected, rel=1e-9)
    tensors = [torch.from_numpy(each).double() for each in (a, b)]
    one = kid_features_to_metric(*tensors, kid_subsets=1, kid_subset_size=150, verbose=False)
    assert unbiased_mmd(a.astype(float), b.astype(float)) == pytest.approx(one["kernel_inception_distance_mean"])


def test_it_is_the_same_both_ways_and_nothing_to_itself():
    a, b = gaussian_of(features(0, 200, 30)), gaussian_of(features(1, 200, 30))
    assert FrechetDistance(a).to(b) == pytest.approx(FrechetDistance(b).to(a), rel=1e-9)
    assert FrechetDistance(a).to(a) == pytest.approx(0, abs=1e-9 * np.trace(a.covariance))


def test_singular_covariances_have_the_distance_of_the_space_they_fill():
    """Features of 6 numbers laid into 60 by a rotation: the distance stays, though both covariances are singular."""
    small, other = features(0, 400, 6), features(1, 400, 6)
    into = np.linalg.qr(np.random.default_rng(2).standard_normal((60, 6)))[0].T
    within = FrechetDistance(gaussian_of(small)).to(gaussian_of(other))
    found = FrechetDistance(gaussian_of(small @ into)).to(gaussian_of(other @ into))
    assert found == pytest.approx(within, rel=1e-6)


def test_fewer_images_than_numbers_give_a_finite_distance():
    a, b = gaussian_of(features(0, 10, 50)), gaussian_of(features(1, 12, 50))
    assert np.isfinite(FrechetDistance(a).to(b))
    assert FrechetDistance(a).to(a) == pytest.approx(0, abs=1e-8 * np.trace(a.covariance))


def test_the_spread_is_that_of_sets_drawn_anew():
    """The 95 % interval, over 40 sets of features, is about twice the deviation of their distances."""
    reference, mixing = FrechetDistance(gaussian_of(features(9, 4000, 8))), features(3, 8, 8)
    rng = np.random.default_rng(4)
    sets = [rng.standard_normal((400, 8)) @ mixing for _ in range(40)]
    deviation = np.std([reference.to(gaussian_of(drawn)) for drawn in sets], ddof=1)
    told = np.mean([reference.spread(drawn) for drawn in sets])
    assert 0.6 < told / (2.262 * deviation) < 1.6


def test_the_spread_leaves_out_what_it_says():
    """The sums give the same Gaussians as the features that are left."""
    from sdtrain.evaluation.distances import _without_each_group

    drawn = features(5, 37, 4) + 1e3
    for first, found in enumerate(_without_each_group(drawn)):
        left = gaussian_of(np.delete(drawn, np.arange(first, 37, 10), axis=0))
        assert found.num == left.num
        np.testing.assert_allclose(found.mean, left.mean, rtol=1e-12)
        np.testing.assert_allclose(found.covariance, left.covariance, rtol=1e-8, atol=1e-8)


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
    monkeypatch.setattr(distances, "_ROWS_AT_ONCE", 7)
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
