"""The depth policy: exact over depths, and every gradient that it computes is exact."""

import numpy as np
import pytest
from hypothesis import assume, given

from d2ft_peft.schedule import Budget, Operation, Problem, get_policy, objective

from .oracle import best_depth, deterministic, problems, zeros


depth = get_policy("depth")


@deterministic
@given(problems(max_rows=4, max_subnets=4))
def test_depths_match_brute_force(problem):
    best = best_depth(problem)
    try:
        schedule = depth(problem)
    except ValueError as error:
        assert "nothing would train" in str(error)
        assert best == 0
        return
    value = objective(problem, schedule)
    assert value <= best * (1 + 1e-9)
    costs = problem.limited_costs * 30 * problem.weights[:, None, None]
    if (np.abs(costs - np.rint(costs)) < 1e-9).all():
        assert value == pytest.approx(best)


@deterministic
@given(problems(max_rows=6, max_subnets=6, budgets=("compute", "communication", "counts")))
def test_every_full_cell_has_its_exact_gradient_and_every_other_row_is_skipped(problem):
    counts_need_equal_weights = problem.budget.counts is None or (problem.weights == problem.weights[0]).all()
    assume(counts_need_equal_weights)
    try:
        schedule = depth(problem)
    except ValueError as error:
        assert "nothing would train" in str(error)
        return
    full = schedule.operations == Operation.FULL
    assert (schedule.exact_gradients == full).all()
    assert (full.any(axis=1) != schedule.skipped).all()
    assert not schedule.devices.any()


def test_an_exact_schedule_for_given_scores():
    # The top block pays most; 1 + 2/3 of 4 units run two rows, one of them only with its top block FULL.
    backward = [[1.0, 3], [0, 3], [0, 1]]
    schedule = depth(Problem(np.zeros((3, 2)), backward, Budget(compute=(2 + 4 / 3) / 6), blocks=[0, 1]))
    assert schedule.operations.tolist() == [[2, 2], [1, 2], [0, 0]]
    assert schedule.num_devices == 1


def test_blocks_need_not_be_sorted_or_start_at_zero():
    scores = np.zeros((2, 3))
    schedule = depth(Problem(scores, scores + 1, Budget(compute=(3 + 1 + 2 / 3) / 6), blocks=[9, 4, 7]))
    assert schedule.operations.tolist() == [[2, 2, 2], [2, 1, 1]]


def test_without_information_whole_micro_batches_are_full():
    schedule = depth(zeros(5, 4, Budget(compute=0.6), blocks=[0, 0, 1, 1]))
    assert schedule.operations.tolist() == [[2] * 4] * 3 + [[0] * 4] * 2


def test_counts_set_the_total_capacity():
    problem = zeros(5, 4, Budget(num_full=2, num_forward_only=2), blocks=[0, 1, 2, 3])
    schedule = depth(problem)
    np.testing.assert_allclose(schedule.capacities, [4 * (2 + 2 / 3)])
    unequal = depth(zeros(3, 2, Budget(num_full=2), weights=[1, 2, 3]))
    assert 0 < unequal.loads[0] <= 2 * 2 * 2  # two subnets, two micro-batches of the mean weight


def test_device_shares_add_up_to_one_machine():
    schedule = depth(zeros(5, 2, Budget(compute=(0.9, 0.3))))
    np.testing.assert_allclose(schedule.capacities, [6])
    assert schedule.operations.tolist() == [[2, 2]] * 3 + [[0, 0]] * 2


def test_communication_is_limited_in_total():
    schedule = depth(zeros(4, 2, Budget(communication=0.5), blocks=[0, 1]))
    assert schedule.communication_ratio == 0.5
    assert schedule.capacities is None


@pytest.mark.parametrize("kind", ["compute", "communication"])
def test_a_budget_too_small_for_any_row_names_the_nearest_possible(kind):
    problem = zeros(5, 10, Budget(**{kind: 0.05}), devices=np.zeros(10, dtype=int))
    with pytest.raises(ValueError, match=rf"{kind}_budget=0.05 .* no micro-batch fits.* 0.2 \(1 FULL of 5\)"):
        depth(problem)


def test_more_blocks_than_a_byte_counts():
    schedule = depth(zeros(3, 300, Budget(compute=1.0), blocks=np.arange(300)))
    assert (schedule.operations == Operation.FULL).all()
