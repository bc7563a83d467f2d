import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch_fidelity.metric_prc import calculate_precision_recall_full

from sdtrain.evaluation.distances import grouped, half_width
from sdtrain.evaluation.features import neighbours
from sdtrain.evaluation.features.neighbours import RealNeighbours


def line(*places):
    return np.array(places, float)[:, None]


def values(overlap):
    return [getattr(overlap, name)[0] for name in ("precision", "recall", "density", "coverage")]


def test_two_sets_on_a_line_worked_by_hand():
    """From 0, 1, ..., 6 it is 3, 2, 2, 2, 2, 2, 3 to the 3rd neighbour and 5, 4, 3, 3, 3, 4, 5 to the 5th.

    From 5, 6, 7, 8, 10 it is 3, 2, 2, 2, 4 to the 3rd.
    """
    found = RealNeighbours(line(*range(7))).overlap(line(5, 6, 7, 8, 10))
    # The balls of real images reach up to 9, those of drawn ones down to 2, which lies on the surface.
    assert (found.precision[0], found.recall[0]) == (4 / 5, 5 / 7)
    # 5 lies inside the balls of 3, 4, 5, 6; 6 of 4, 5, 6; 7 and 8 of 5, 6; 10 of 6 alone. 3 from 3's ball is outside.
    assert found.density[0] == pytest.approx((4 + 3 + 2 + 2 + 1) / 5 / 5)
    assert found.coverage[0] == 4 / 7


def test_a_ball_reaches_no_further_than_its_neighbours():
    near, far = line(0, 1, 2, 3, 4, 5), line(100, 101, 102, 103, 104, 105)
    assert values(RealNeighbours(near).overlap(far)) == [0, 0, 0, 0]
    same = RealNeighbours(near).overlap(near)
    assert (same.precision, same.recall, same.coverage) == ((1, 0), (1, 0), (1, 0))


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    return rng.normal(0, 1, (500, 12)).astype(np.float32), rng.normal(0.3, 0.8, (330, 12)).astype(np.float32)


def by_definition(real, drawn):
    """Density and coverage with all distances at hand."""
    radii = np.sort(cdist(real, real), axis=1)[:, 5]
    inside = cdist(real, drawn) < radii[:, None]
    return [inside.sum(axis=0).mean() / 5, inside.any(axis=1).mean()]


def test_numbers_are_torch_fidelitys_and_those_of_the_definition(sets):
    real, drawn = sets
    precision, recall = calculate_precision_recall_full(torch.from_numpy(drawn), torch.from_numpy(real), 3)
    found = values(RealNeighbours(real).overlap(drawn))
    assert found == pytest.approx([precision, recall, *by_definition(real, drawn)], abs=1e-6)
    assert 0.05 < min(found) < 0.95


def test_blocks_change_nothing(sets, monkeypatch):
    real, drawn = sets
    whole = RealNeighbours(real).overlap(drawn)
    monkeypatch.setattr(neighbours, "_ROWS", 37)
    monkeypatch.setattr(neighbours, "_COLUMNS", 11)
    assert RealNeighbours(real).overlap(drawn) == whole


def test_the_jackknife_leaves_each_group_out(sets):
    """Recall and coverage of nine tenths of the images, found from scratch."""
    real, drawn = sets
    compared, found = RealNeighbours(real), RealNeighbours(real).overlap(drawn)
    without = [compared.overlap(np.delete(drawn, members, axis=0)) for members in grouped(len(drawn))]
    for name in ("recall", "coverage"):
        assert getattr(found, name)[1] == pytest.approx(half_width([getattr(each, name)[0] for each in without]))


def test_spreads_are_those_of_many_draws():
    """The jackknife's, whose statistics are not smooth, are a little wide."""
    rng = np.random.default_rng(0)
    real = RealNeighbours(rng.normal(0, 1, (300, 8)))
    draws = [real.overlap(rng.normal(0.3, 0.8, (200, 8))) for _ in range(60)]
    for name, most in (("precision", 1.3), ("density", 1.3), ("recall", 1.8), ("coverage", 1.8)):
        numbers = np.array([getattr(draw, name) for draw in draws])
        assert 0.8 < numbers[:, 1].mean() / (1.96 * numbers[:, 0].std()) < most, name


def test_memory_is_that_of_a_block(monkeypatch):
    """No array of distances is larger than a block, however many images there are."""
    sizes, measure = [], neighbours._squared_distances
    monkeypatch.setattr(neighbours, "_squared_distances", lambda x, y: sizes.append(len(x) * len(y)) or measure(x, y))
    rng = np.random.default_rng(0)
    RealNeighbours(rng.normal(size=(4500, 2))).overlap(rng.normal(size=(3000, 2)))
    assert max(sizes) <= neighbours._ROWS * neighbours._COLUMNS == 2**22
    assert sum(sizes) == 4500**2 + 3000**2 + 4500 * 3000
