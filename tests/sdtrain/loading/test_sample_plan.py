import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtrain.loading.order import BlockOrder, GlobalOrder
from sdtrain.loading.sample_plan import SamplePlan, SourcePlan, interleave, position_of, sample_noise
from sdtrain.mixing import mix64

seeds = st.integers(0, 2**63)


def global_plan(num_samples, global_batch_size, seed):
    """One dataset of one size in a global shuffle."""
    return SamplePlan([SourcePlan((GlobalOrder(num_samples, seed),))], global_batch_size)


@st.composite
def orders(draw, name=""):
    """A global order, or one over blocks of shards, some of them empty."""
    if draw(st.booleans()):
        return GlobalOrder(draw(st.integers(1, 200)), draw(seeds), name)
    sizes = [*draw(st.lists(st.integers(0, 20), max_size=12)), draw(st.integers(1, 20))]
    return BlockOrder(np.array(sizes), draw(st.integers(1, 5)), draw(seeds), "", name)


@st.composite
def sources(draw):
    """One to three datasets of one to three sizes."""
    return [
        SourcePlan(
            tuple(draw(orders(f"{n} {size}")) for size in range(draw(st.integers(1, 3)))), draw(st.integers(1, 9))
        )
        for n in range(draw(st.integers(1, 3)))
    ]


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 10**6))
def test_every_epoch_holds_every_sample_once(order, epoch):
    plan = SamplePlan([SourcePlan((order,))], 4)
    picks = plan.at(np.arange(epoch * order.size, (epoch + 1) * order.size))
    assert sorted(picks.indices) == list(range(order.size))
    assert (picks.epochs == epoch).all()


@settings(max_examples=20, deadline=None)
@given(sources(), st.integers(1, 4))
def test_every_size_of_every_source_goes_through_its_own_epochs_exactly_once(datasets, group):
    plan, ends = SamplePlan(datasets, 4 * group, group), {}
    picks = plan.at(np.arange(700 * group))
    for index, epoch in zip(picks.indices.tolist(), picks.epochs.tolist(), strict=True):
        ends.setdefault(plan.stream_of(index), []).append((epoch, index))
    for (first, size), seen in ends.items():
        for epoch in range(len(seen) // size):
            part = seen[epoch * size : (epoch + 1) * size]
            assert sorted(part) == [(epoch, first + number) for number in range(size)]


@settings(max_examples=60, deadline=None)
@given(sources(), st.integers(1, 5), st.integers(0, 10**9))
def test_a_group_is_of_one_source_and_size(datasets, group, first):
    plan = SamplePlan(datasets, 4 * group, group)
    for at in range(first, first + 5):
        picks = plan.at(np.arange(at * group, (at + 1) * group))
        assert len({plan.stream_of(int(index)) for index in picks.indices}) == 1


@settings(max_examples=60, deadline=None)
@given(sources(), st.sampled_from([1, 2, 4]), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6))
def test_ranks_and_micro_steps_share_the_batch_without_loss(datasets, world_size, accumulation, size, step):
    plan = SamplePlan(datasets, world_size * accumulation * size)
    parts = [
        plan.micro_batch(step, micro_step, rank, world_size, size)
        for micro_step in range(accumulation)
        for rank in range(world_size)
    ]
    np.testing.assert_array_equal(np.concatenate([part.indices for part in parts]), plan.batch(step).indices)
    np.testing.assert_array_equal(np.concatenate([part.epochs for part in parts]), plan.batch(step).epochs)


@settings(max_examples=30, deadline=None)
@given(sources(), st.integers(1, 40), st.integers(1, 30))
def test_batches_follow_each_other_without_gap_from_any_step_on(datasets, batch, num_steps):
    plan = SamplePlan(datasets, batch)
    joined = np.concatenate([plan.batch(step).indices for step in range(num_steps)])
    np.testing.assert_array_equal(joined, plan.at(np.arange(batch * num_steps)).indices)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=5), st.integers(0, 10**12))
def test_sources_take_turns_in_the_proportion_of_their_shares(shares, first):
    plan = SamplePlan([SourcePlan((GlobalOrder(7, 1, str(n)),), share) for n, share in enumerate(shares)], 4)
    sources = plan.at(np.arange(first, first + 1000)).indices // 7
    for n, share in enumerate(shares):
        drawn = np.cumsum(sources == n)
        assert np.abs(drawn - np.arange(1, 1001) * share / sum(shares)).max() <= 2 * len(shares)


@settings(max_examples=25, deadline=None)
@given(sources(), st.integers(1, 4), st.integers(0, 600))
def test_exposures_are_those_of_a_replay(datasets, group, end):
    plan = SamplePlan(datasets, 4 * group, group)
    replayed = plan.at(np.arange(end))
    asked = np.arange(plan.size)[::-1]
    found = plan.find(asked, end)
    np.testing.assert_array_equal(np.sort(found.positions), np.arange(end))
    np.testing.assert_array_equal(asked[found.rows], replayed.indices[found.positions])
    np.testing.assert_array_equal(found.epochs, replayed.epochs[found.positions])
    assert list(zip(found.rows, found.positions, strict=True)) == sorted(zip(found.rows, found.positions, strict=True))


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 10**12))
def test_orders_late_in_training_are_inverted_as_they_are_drawn(order, epoch):
    offsets = np.arange(order.size)
    np.testing.assert_array_equal(order.find(epoch, order.at(epoch, offsets)), offsets)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 2**26), min_size=1, max_size=5), st.data())
def test_the_positions_of_a_stream_are_the_inverse_of_taking_turns(shares, data):
    positions = np.array(data.draw(st.lists(st.integers(0, 2**52), min_size=1, max_size=20)))
    streams, within = interleave(positions, shares)
    for stream in np.unique(streams):
        here = streams == stream
        np.testing.assert_array_equal(position_of(within[here], int(stream), shares), positions[here])


def test_no_position_draws_a_sample_outside_the_plan():
    for index in (-1, 10):
        with pytest.raises(IndexError, match="0 to 9"):
            global_plan(10, 2, 1).find(np.array([index]), 100)


def test_the_order_of_one_dataset_is_still_that_of_older_runs():
    drawn = global_plan(1000, 8, seed=42).at(np.arange(1996, 2004)).indices
    assert drawn.tolist() == [105, 527, 318, 451, 996, 265, 36, 643]


def test_epochs_and_seeds_shuffle_differently_and_without_pattern():
    n = 5000
    first, second = global_plan(n, 1, 1).at(np.arange(2 * n)).indices.reshape(2, n)
    other = global_plan(n, 1, 2).at(np.arange(n)).indices
    for a, b in ((first, np.arange(n)), (first, second), (first, other), (first[1:], first[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
        assert np.mean(a == b) < 0.002


def test_blocks_read_each_shard_in_one_stretch_and_mix_a_window_evenly():
    shards, size, window = 60, 50, 6
    order = BlockOrder(np.full(shards, size), window, seed=3)
    first, second = (order.at(epoch, np.arange(shards * size)) // size for epoch in (0, 1))
    for shard in range(shards):
        places = np.flatnonzero(first == shard)
        assert places[0] // (window * size) == places[-1] // (window * size)
        assert places[-1] - places[0] > 0.7 * window * size  # over nearly all of its window
    together = [{frozenset(part) for part in np.split(epoch, shards // window)} for epoch in (first, second)]
    assert not together[0] & together[1]  # no window comes again


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_any_place_among_a_billion_samples_is_computed_at_once(shuffle):
    shards = np.full(100_000, 10_000)
    order = GlobalOrder(10**9, 1) if shuffle == "global" else BlockOrder(shards, 64, 1)
    plan = SamplePlan([SourcePlan((order,))], 2048)
    spent = time.process_time()
    picks = plan.batch(3_236_999)
    assert time.process_time() - spent < 1
    assert len(np.unique(picks.indices)) == 2048
    assert set(picks.epochs) == {6}
    assert 0 <= picks.indices.min() <= picks.indices.max() < 10**9
    assert len(np.unique(picks.indices // 10_000)) > (2000 if shuffle == "global" else 60)


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_one_sample_in_a_billion_is_found_with_work_for_its_epochs_alone(shuffle, monkeypatch):
    num_mixed, num_networks = 0, 0

    def counted(values):
        nonlocal num_mixed, num_networks
        num_mixed, num_networks = num_mixed + len(values), num_networks + 1
        return mix64(values)

    order = GlobalOrder(10**9, 1) if shuffle == "global" else BlockOrder(np.full(100_000, 10_000), 64, 1)
    plan = SamplePlan([SourcePlan((order,))], 2048)
    monkeypatch.setattr("sdtrain.loading.order.mix64", counted)
    found = plan.find(np.array([123_456_789]), 6 * 10**9)
    assert found.epochs.tolist() == list(range(6))
    per_epoch = 0 if shuffle == "global" else 8 * 2**18  # the order of the shards, at most once around all cycles
    assert num_mixed <= 6 * (per_epoch + 8 * 30)
    assert num_networks <= 6 * 8 * 60
    monkeypatch.undo()
    np.testing.assert_array_equal(plan.at(found.positions).indices, 123_456_789)


def test_chance_of_a_sample_depends_on_seed_step_and_uid_only():
    again = [sample_noise(5, 9, "ab", 1000, (4, 8, 8)) for _ in range(2)]
    assert again[0].timestep == again[1].timestep
    np.testing.assert_array_equal(again[0].noise, again[1].noise)
    for other in (sample_noise(6, 9, "ab", 1000, (4, 8, 8)), sample_noise(5, 9, "ac", 1000, (4, 8, 8))):
        assert not np.array_equal(other.noise, again[0].noise)
    assert not np.array_equal(again[0].noise, again[0].posterior)


def test_chance_has_the_right_distributions():
    drawn = [sample_noise(1, step, f"{step % 50}", 1000, (4, 4, 4)) for step in range(4000)]
    noise = np.stack([d.noise for d in drawn])
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs(np.mean([d.drop < 0.1 for d in drawn]) - 0.1) < 0.02
    timesteps = np.array([d.timestep for d in drawn])
    assert (timesteps.min(), timesteps.max()) >= (0, 990)
    assert abs(timesteps.mean() - 499.5) < 20
