"""The paper's two levels: each exact, aligned where nothing decides, and the paper's setting in balance."""

import numpy as np
import pytest
from hypothesis import given

from d2ft_peft.schedule import Budget, Operation, Problem, get_policy

from .oracle import best_bilevel, cells_of, deterministic, problems, zeros


bilevel = get_policy("bilevel")


@deterministic
@given(problems())
def test_both_levels_match_brute_force(problem):
    schedule = bilevel(problem)
    for device in range(problem.num_devices):
        forward, backward, costs = cells_of(problem, device)
        operations = schedule.operations[:, problem.devices == device].ravel()
        full, forward_only = operations == Operation.FULL, operations == Operation.FORWARD_ONLY
        best_full, best_forward_only = best_bilevel(problem, device, full)
        assert backward[full].sum() <= best_full + 1e-9
        assert forward[forward_only].sum() <= best_forward_only + 1e-9
        if whole(costs):
            assert backward[full].sum() == pytest.approx(best_full)
            assert forward[forward_only].sum() == pytest.approx(best_forward_only)


def whole(costs):
    """Whether each level's costs are equal or multiples of a unit that the solver finds; others it rounds up."""
    return all(
        (np.abs(column * 30 - np.rint(column * 30)) < 1e-9).all() or (column == column[0]).all() for column in costs.T
    )


@deterministic
@given(problems(budgets=("counts",)))
def test_counts_pick_the_best_of_each_subnet(problem):
    num_full, num_forward_only = problem.budget.counts
    for subnet, operations in enumerate(bilevel(problem).operations.T):
        backward, forward = problem.backward_scores[:, subnet], problem.forward_scores[:, subnet]
        full = operations == Operation.FULL
        assert backward[full].sum() == pytest.approx(np.sort(backward)[::-1][:num_full].sum())
        rest = np.sort(forward[~full])[::-1]
        assert forward[operations == Operation.FORWARD_ONLY].sum() == pytest.approx(rest[:num_forward_only].sum())


def test_the_papers_setting_has_workload_variance_zero():
    rng = np.random.default_rng(0)
    blocks = np.repeat(np.arange(12), 6)
    for budget in (Budget(num_full=3, num_forward_only=1), Budget(compute=(3 + 1 / 3) / 5)):
        schedule = bilevel(Problem(rng.random((5, 72)), rng.random((5, 72)), budget, blocks=blocks))
        assert schedule.workload_variance == 0.0
        assert schedule.counts == {Operation.SHORTCUT: 72, Operation.FORWARD_ONLY: 72, Operation.FULL: 216}
        assert schedule.compute_ratio == pytest.approx(2 / 3)
        assert schedule.communication_ratio == pytest.approx(0.7)
        assert schedule.alignment < 0.6


def test_an_exact_schedule_for_given_scores():
    backward = [[3.0, 1], [2, 2], [1, 3]]
    forward = [[0.0, 5], [1, 4], [2, 3]]
    schedule = bilevel(Problem(forward, backward, Budget(compute=4 / 9)))
    assert schedule.operations.tolist() == [[2, 1], [0, 0], [1, 2]]


@pytest.mark.parametrize("devices", [None, np.zeros(6, dtype=int), [0, 0, 1, 1, 1, 2]])
@pytest.mark.parametrize("score", [0.0, 0.1])
def test_without_information_the_first_micro_batches_are_full_everywhere(devices, score):
    scores = np.full((5, 6), score)
    schedule = bilevel(Problem(scores, scores, Budget(compute=0.6), devices=devices))
    assert schedule.operations.tolist() == [[2] * 6] * 3 + [[0] * 6] * 2


def test_ties_prefer_the_micro_batch_with_the_highest_total_score():
    forward = np.zeros((5, 3))
    forward[[4, 2], [0, 1]] = [9, 5]
    backward = np.tile([0.3, 0.1, 0.7], (5, 1))
    schedule = bilevel(Problem(forward, backward, Budget(compute=0.6)))
    assert schedule.operations[:, 0].tolist() == [2, 0, 2, 0, 2]
    assert schedule.alignment == 1


def test_preference_never_overrules_a_better_value():
    forward = np.zeros((3, 2))
    forward[0, 1] = 100
    backward = np.array([[0, 0], [1e-12, 0], [0, 0]])
    schedule = bilevel(Problem(forward, backward, Budget(compute=1 / 3)))
    assert schedule.operations[:, 0].tolist() == [0, 2, 0]
    assert schedule.operations[:, 1].tolist() == [2, 0, 0]


def test_spread_rotates_the_preference_by_device():
    schedule = bilevel(zeros(5, 5, Budget(compute=0.4), tie_break="spread"))
    assert schedule.operations.T.tolist() == [np.roll([2, 2, 0, 0, 0], k).tolist() for k in range(5)]
    by_counts = bilevel(zeros(5, 5, Budget(num_full=2), tie_break="spread"))
    assert (by_counts.operations == schedule.operations).all()


def test_unequal_micro_batches_need_more_than_the_greedy_choice():
    # By value per sample micro-batch 0 comes first; taking 1 and 2 instead fills the capacity of 10.
    backward = np.array([[7.0], [5], [5]])
    schedule = bilevel(Problem(np.zeros((3, 1)), backward, Budget(compute=10 / 16), weights=[6, 5, 5]))
    assert schedule.operations[:, 0].tolist() == [0, 2, 2]


def test_communication_is_limited_instead_of_compute():
    schedule = bilevel(zeros(5, 3, Budget(communication=0.5)))
    assert schedule.operations[:, 0].tolist() == [2, 2, 1, 0, 0]
    assert schedule.communication_ratio == 0.5
    assert schedule.capacities is None


def test_each_device_keeps_its_own_capacity():
    schedule = bilevel(zeros(5, 4, Budget(compute=(0.2, 0.8)), devices=[0, 0, 1, 1]))
    np.testing.assert_allclose(schedule.loads, [2, 8])
    np.testing.assert_allclose(schedule.capacities, [2, 8])


@pytest.mark.parametrize("weights", [np.ones(98), np.arange(98) % 7 + 1.0])
def test_a_hundred_thousand_cells_on_one_device_run_to_completion(weights):
    rng = np.random.default_rng(0)
    scores = rng.random((98, 1024))
    problem = Problem(scores, scores[::-1], Budget(compute=0.6), devices=np.zeros(1024, dtype=int), weights=weights)
    assert bilevel(problem).compute_ratio == pytest.approx(0.6, abs=1e-4)
