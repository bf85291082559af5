"""Schedules of a run share what they have in common, and stay immutable."""

import numpy as np
import pytest

from d2ft_peft.schedule import Budget, Problem, Schedule, compose


def test_schedules_of_one_problem_share_all_but_their_operations():
    problem = Problem(np.ones((4, 3)), np.ones((4, 3)), Budget(compute=0.5))
    first, second = (problem.schedule(np.zeros((4, 3), dtype=int)) for _ in range(2))
    for field in ("costs", "devices", "blocks", "weights", "capacities"):
        assert getattr(first, field) is getattr(second, field)
    again = Schedule(first.operations, first.weights, first.devices, first.costs, None, first.blocks)
    assert again.operations is first.operations


def test_arrays_that_somebody_may_still_write_to_are_copied():
    operations, weights = np.zeros((2, 1), dtype=np.int8), np.ones(2)
    view = weights[:]
    view.setflags(write=False)  # the array under it is not
    schedule = Schedule(operations, view)
    operations[0], weights[0] = 2, 7.0
    assert schedule.operations[0, 0] == 0
    assert schedule.weights[0] == 1


def test_frozen_arrays_are_judged_like_others():
    wrong = np.full((2, 1), 3, dtype=np.int8)
    negative = np.array([1.0, -1.0])
    for array in (wrong, negative):
        array.setflags(write=False)
    with pytest.raises(ValueError, match=r"operations\[0, 0\]=3 must be in 0..2"):
        Schedule(wrong)
    with pytest.raises(ValueError, match=r"weights\[1\]=-1.0 must not be negative"):
        Schedule(np.zeros((2, 1), dtype=int), negative)


def test_a_device_number_far_beyond_the_subnets_is_refused_without_counting_up_to_it():
    with pytest.raises(ValueError, match="devices: no subnet on device 1"):
        Schedule([[0, 0]], devices=[0, 1 << 40])


def test_composing_keeps_the_order_of_rows_and_of_samples():
    samples = Schedule([[1, 2], [2, 1], [0, 0], [1, 2], [2, 1], [2, 2]])
    composition = compose(samples, 8)
    assert [part.tolist() for part in composition.micro_batches] == [[5], [1, 4], [0, 3]]
    assert composition.schedule.operations.tolist() == [[2, 2], [2, 1], [1, 2], [0, 0]]
