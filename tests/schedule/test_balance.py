"""Samples shared out over unequal processes: nobody could be ready earlier, held against all ways to share them out."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ft_peft.schedule import Schedule, balance, balanced_total, compose

from .oracle import deterministic


@st.composite
def instances(draw):
    """(total, fixed [R], per_sample [R], most), with ties."""
    processes, most = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    seconds = st.sampled_from([0.0, 0.5, 1.0, 1.7, 3.0])
    fixed = draw(st.lists(seconds, min_size=processes, max_size=processes))
    per_sample = draw(st.lists(st.sampled_from([0.3, 1.0, 1.5, 4.0]), min_size=processes, max_size=processes))
    return draw(st.integers(processes, processes * most)), np.array(fixed), np.array(per_sample), most


@deterministic
@given(instances())
def test_nobody_could_be_ready_earlier(instance):
    total, fixed, per_sample, most = instance
    counts = balance(*instance)
    assert counts.sum() == total and counts.min() >= 1 and counts.max() <= most
    ways = [way for way in itertools.product(range(1, most + 1), repeat=len(fixed)) if sum(way) == total]
    earliest = (fixed + per_sample * np.array(ways)).max(axis=1).min()
    assert (fixed + per_sample * counts).max() == pytest.approx(earliest)


@deterministic
@given(instances())
def test_the_balanced_total_is_the_most_before_a_process_runs_out_of_candidates_and_waits(instance):
    _, fixed, per_sample, most = instance
    total = balanced_total(fixed, per_sample, most)
    through = (fixed + per_sample * most).min() * (1 + 1e-9)  # when the first process has run all of its candidates

    def late(counts):  # a process that has more than the one sample which everyone runs
        return bool(((counts > 1) & (fixed + per_sample * counts > through)).any())

    assert not late(balance(total, fixed, per_sample, most))
    assert total == len(fixed) * most or late(balance(total + 1, fixed, per_sample, most))


def test_speeds_two_to_one():
    assert balance(12, np.zeros(2), np.array([1.0, 2.0]), 8).tolist() == [8, 4]
    assert balanced_total(np.zeros(2), np.array([1.0, 2.0]), 8) == 12
    # What a step costs besides its samples counts as well.
    assert balance(12, np.array([0.0, 3.0]), np.array([1.0, 1.0]), 8).tolist() == [8, 4]
    # Equal processes get equal shares, the first of them what is left over.
    assert balance(5, np.zeros(2), np.ones(2), 8).tolist() == [3, 2]


@pytest.mark.parametrize("total", [1, 9])
def test_a_total_that_cannot_be_shared_out_is_refused(total):
    with pytest.raises(ValueError, match=f"total={total} must lie within 2 and 8"):
        balance(total, np.zeros(2), np.ones(2), 4)


@pytest.mark.parametrize(("fixed", "per_sample"), [([0, -1], [1, 1]), ([0, 0], [0, 1]), ([0, np.nan], [1, 1])])
def test_times_that_are_none_are_refused(fixed, per_sample):
    with pytest.raises(ValueError, match="must be finite seconds"):
        balance(4, fixed, per_sample, 4)


def test_a_process_sees_the_step_of_all_in_its_own():
    """Six of eight candidates here, nine of sixteen in both processes."""
    samples = Schedule(np.array([[2, 2]] * 6 + [[0, 0]] * 2))
    schedule, sizes = compose(samples, 4).among_processes(9, 16)
    assert sizes.tolist() == [3, 3, 2]
    assert schedule.weights.tolist() == [4.5, 4.5, 7]
    assert schedule.compute_ratio == 9 / 16


def test_a_process_that_runs_everything_knows_of_what_others_do_not_run():
    schedule, sizes = compose(Schedule(np.full((4, 2), 2)), 4).among_processes(5, 8)
    assert sizes.tolist() == [4, 0]
    assert schedule.weights.tolist() == [5, 3]
    assert schedule.operations.tolist() == [[2, 2], [0, 0]]


def test_alone_a_composition_stays_as_it_is():
    samples = Schedule(np.array([[2, 2], [1, 2], [0, 0]]))
    composition = compose(samples, 4)
    assert composition.among_processes(2, 3)[0] == composition.schedule


def test_samples_that_run_in_part_are_refused_in_several_processes():
    with pytest.raises(ValueError, match="in several processes they run as a whole"):
        compose(Schedule(np.array([[2, 2], [1, 2], [0, 0]])), 4).among_processes(4, 6)
