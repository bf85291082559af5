"""The joint optimum: exact, and never worth less than the paper's two levels."""

import numpy as np
import pytest
from hypothesis import given

from d2ft_peft.schedule import Budget, Operation, Problem, bilevel_gap, get_policy, objective

from .oracle import best_joint, best_joint_by_counts, deterministic, problems, zeros


joint, bilevel = get_policy("joint"), get_policy("bilevel")


def value_of_device(problem, schedule, device):
    columns = problem.devices == device
    operations = schedule.operations[:, columns]
    forward, backward = problem.forward_scores[:, columns], problem.backward_scores[:, columns]
    return (forward * (operations > 0) + backward * (operations == 2)).sum()


def is_whole(problem):
    """Whether all costs are multiples of a 30th, so that the solver need not round."""
    costs = problem.limited_costs * 30 * problem.weights[:, None, None]
    return (np.abs(costs - np.rint(costs)) < 1e-9).all()


@deterministic
@given(problems(max_rows=4, max_subnets=2))
def test_joint_matches_brute_force(problem):
    schedule = joint(problem)
    for device in range(problem.num_devices):
        value, best = value_of_device(problem, schedule, device), best_joint(problem, device)
        assert value <= best * (1 + 1e-9)
        if is_whole(problem):
            assert value == pytest.approx(best)


@deterministic
@given(problems(max_rows=6, budgets=("counts",)))
def test_counts_match_brute_force(problem):
    schedule = joint(problem)
    for subnet in range(problem.num_subnets):
        operations = schedule.operations[:, subnet]
        value = (
            problem.forward_scores[operations > 0, subnet].sum()
            + problem.backward_scores[operations == 2, subnet].sum()
        )
        assert value == pytest.approx(best_joint_by_counts(problem, subnet))


@pytest.mark.thorough
@deterministic
@given(problems(max_rows=6, max_subnets=4, budgets=("compute", "communication", "counts")))
def test_joint_is_worth_at_least_bilevel(problem):
    assert objective(problem, joint(problem)) >= objective(problem, bilevel(problem)) * (1 - 1e-9)
    assert 0 <= bilevel_gap(problem) <= 1


def test_objective_counts_forward_of_every_cell_that_runs_and_backward_of_full():
    problem = Problem([[1.0, 2, 4]], [[10.0, 20, 40]], Budget(compute=1.0))
    assert objective(problem, problem.schedule([[2, 1, 0]])) == 1 + 10 + 2


def test_two_levels_can_miss_the_optimum():
    # FULL of micro-batch 0 gains 1 and costs three FORWARD_ONLY cells worth 5 each.
    problem = Problem([[0.0], [5], [5], [5]], [[1.0], [0], [0], [0]], Budget(compute=0.25))
    assert bilevel(problem).operations[:, 0].tolist() == [2, 0, 0, 0]
    assert joint(problem).operations[:, 0].tolist() == [0, 1, 1, 1]
    assert bilevel_gap(problem) == pytest.approx(14 / 15)


def test_costs_that_must_be_rounded_never_make_joint_worse_than_bilevel():
    # The budget is exactly micro-batch 0 FULL, which does not fit once costs are rounded up to a common unit.
    weights = np.array([0.999278, 1.101498])
    budget = Budget(compute=weights[0] / weights.sum())
    problem = Problem(np.zeros((2, 1)), [[2.0], [5.0]], budget, weights=weights, costs=[[0, 0.014345, 1]])
    assert objective(problem, joint(problem)) == objective(problem, bilevel(problem)) == 2


def test_gap_is_zero_where_nothing_is_worth_anything():
    assert bilevel_gap(zeros(4, 3, Budget(compute=0.5))) == 0


def test_without_information_rows_are_uniform_and_the_first_are_full():
    for budget in (Budget(compute=0.6), Budget(num_full=3)):
        assert joint(zeros(5, 6, budget)).operations.tolist() == [[2] * 6] * 3 + [[0] * 6] * 2


def test_a_hundred_thousand_cells_on_one_device_reach_the_linear_bound():
    rng = np.random.default_rng(0)
    forward, backward = rng.random((2, 98, 1024))
    problem = Problem(forward, backward, Budget(compute=0.6), devices=np.zeros(1024, dtype=int))
    # Any price of compute bounds the optimum from above: price * capacity + what each cell then earns at best.
    bound = min(
        price * problem.limits[0] + np.maximum(0, np.maximum(forward - price / 3, forward + backward - price)).sum()
        for price in np.linspace(0.4, 0.8, 401)
    )
    schedule = joint(problem)
    assert bound * (1 - 1e-5) < objective(problem, schedule) <= bound
    assert schedule.counts[Operation.FULL] > 0
