"""Policies over samples, and the micro-batches that are composed of what they choose."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ft_peft.schedule import Budget, Operation, Problem, Schedule, compose, get_policy

from .oracle import deterministic


POLICIES = ["fewer_samples", "importance", "selective_backprop"]


def problem(scores, budget, seed=0, subnets=4, **facts):
    scores = np.broadcast_to(np.asarray(scores, dtype=float)[:, None], (len(scores), subnets))
    rng = np.random.default_rng(seed)
    return Problem(forward_scores=scores, backward_scores=scores, budget=budget, rng=rng, **facts)


def chosen(schedule):
    return np.flatnonzero(~schedule.skipped)


@pytest.mark.parametrize("name", POLICIES)
@deterministic
@given(n=st.integers(1, 40), share=st.floats(0.05, 1.0), seed=st.integers(0, 99))
def test_as_many_whole_samples_run_as_the_budget_has_room_for(name, n, share, seed):
    scores = np.random.default_rng(seed).random(n)
    room = int(np.floor(share * n * (1 + 1e-9)))
    if room == 0:
        with pytest.raises(ValueError, match="nearest possible"):
            get_policy(name)(problem(scores, Budget(compute=share)))
        return
    schedule = get_policy(name)(problem(scores, Budget(compute=share), seed))
    assert set(np.unique(schedule.operations)) <= {Operation.SHORTCUT, Operation.FULL}
    assert (schedule.operations == schedule.operations[:, :1]).all()
    assert len(chosen(schedule)) == room


@pytest.mark.parametrize("name", POLICIES)
def test_the_least_capable_device_decides(name):
    budget = Budget(compute=(0.9, 0.4))
    schedule = get_policy(name)(problem(np.ones(10), budget, devices=[0, 0, 1, 1]))
    assert len(chosen(schedule)) == 4


@pytest.mark.parametrize("name", POLICIES)
def test_a_draw_without_a_source_of_randomness_is_refused(name):
    scores = np.ones((3, 2))
    with pytest.raises(ValueError, match="rng=None"):
        get_policy(name)(Problem(scores, scores, Budget(compute=0.5)))


def shares(name, scores, runs=4000, budget=0.25):
    """How often each sample runs, relative to the mean."""
    count = np.zeros(len(scores))
    for seed in range(runs):
        count[chosen(get_policy(name)(problem(scores, Budget(compute=budget), seed)))] += 1
    return count / count.mean()


@pytest.mark.thorough
def test_importance_draws_in_proportion_within_floor_and_cap():
    """One of many is drawn: its chance is its share of the scores, none below a tenth of the mean or above ten."""
    scores = np.array([1.0, 2.0, 3.0, 0.0])
    expected = np.array([1.0, 2.0, 3.0, 0.15]) / 6.15 * 4
    np.testing.assert_allclose(shares("importance", scores), expected, atol=0.12)
    outlier = shares("importance", np.array([1.0] * 39 + [1e6]), runs=2000, budget=1 / 40)
    assert outlier[-1] == pytest.approx(40 * 10 / (10 + 39 * 0.1), rel=0.1)


@pytest.mark.thorough
def test_selective_backprop_draws_by_percentile_and_fewer_samples_by_nothing():
    scores = np.array([0.1, 5.0, 5.1, 1e6])
    np.testing.assert_allclose(shares("selective_backprop", scores), np.array([1, 2, 3, 4]) / 10 * 4, atol=0.12)
    np.testing.assert_allclose(shares("fewer_samples", scores), 1.0, atol=0.12)


@deterministic
@given(n=st.integers(1, 30), size=st.integers(1, 8), kinds=st.integers(1, 3), seed=st.integers(0, 99))
def test_composition_runs_every_sample_under_its_own_operations(n, size, kinds, seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 3, (kinds, 5))
    samples = Schedule(rows[rng.integers(0, kinds, n)], costs=np.tile([0, 0.4, 1.0], (5, 1)))
    composition = compose(samples, size)
    schedule = composition.schedule
    for row, positions in zip(schedule.operations, composition.micro_batches, strict=False):
        assert 1 <= len(positions) <= size
        assert (samples.operations[positions] == row).all()
        assert (np.diff(positions) > 0).all()
    running = np.concatenate([*composition.micro_batches, np.empty(0, dtype=int)])
    assert sorted(running) == list(chosen(samples))
    assert schedule.weights.sum() == n
    assert schedule.compute_ratio == pytest.approx(samples.compute_ratio)
    assert schedule.num_micro_batches == len(composition.micro_batches) + samples.skipped.any()


def test_micro_batches_of_a_composition_are_of_nearly_equal_size():
    samples = Schedule(np.array([[2, 2]] * 10 + [[0, 0]] * 6))
    assert [len(part) for part in compose(samples, 4).micro_batches] == [4, 3, 3]
    assert [len(part) for part in compose(samples, 5).micro_batches] == [5, 5]
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        compose(samples, 0)
