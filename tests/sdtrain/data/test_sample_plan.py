import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sdtrain.data.sample_plan import SamplePlan, sample_noise


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(1, 64), st.integers(0, 2**63), st.integers(0, 10**6))
def test_every_epoch_holds_every_sample_once(num_samples, batch, seed, epoch):
    plan = SamplePlan(num_samples, batch, seed)
    positions = np.arange(epoch * num_samples, (epoch + 1) * num_samples)
    assert sorted(plan.at(positions)) == list(range(num_samples))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.sampled_from([1, 2, 3, 4]), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6))
def test_ranks_and_micro_steps_share_the_batch_without_loss(num_samples, world_size, accumulation, size, step):
    plan = SamplePlan(num_samples, world_size * accumulation * size, seed=7)
    parts = [
        plan.micro_batch(step, micro_step, rank, world_size, size)
        for micro_step in range(accumulation)
        for rank in range(world_size)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), plan.batch(step))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(1, 40), st.integers(1, 30))
def test_batches_follow_each_other_without_gap(num_samples, batch, num_steps):
    plan = SamplePlan(num_samples, batch, seed=3)
    joined = np.concatenate([plan.batch(step) for step in range(num_steps)])
    np.testing.assert_array_equal(joined, plan.at(np.arange(batch * num_steps)))


def test_epochs_and_seeds_shuffle_differently_and_without_pattern():
    n = 5000
    first, second = SamplePlan(n, 1, 1).at(np.arange(2 * n)).reshape(2, n)
    other = SamplePlan(n, 1, 2).at(np.arange(n))
    for a, b in ((first, np.arange(n)), (first, second), (first, other), (first[1:], first[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
        assert np.mean(a == b) < 0.002


def test_half_a_billion_samples_cost_no_more_than_a_few():
    batch = SamplePlan(485_000_000, 2048, seed=1).batch(236_999)
    assert len(np.unique(batch)) == 2048
    assert batch.min() >= 0
    assert batch.max() < 485_000_000


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
