import numpy as np
import pytest
import scipy.linalg

from sdtrain.evaluation.distances import FrechetDistance, Gaussian, gaussian_of


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
