"""Problems refuse numbers that no policy could use."""

import numpy as np
import pytest

from d2ft_peft.schedule import Budget, Problem

from .oracle import zeros


BUDGET = Budget(compute=0.5)
SCORES = np.ones((4, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"forward_scores": [1.0]}, r"forward_scores has shape \(1,\), it must be \[micro-batches, subnets\]"),
        ({"backward_scores": np.ones((2, 4))}, r"backward_scores has shape \(2, 4\), it must have shape \(4, 2\)"),
        ({"forward_scores": -SCORES}, r"forward_scores\[0, 0\]=-1.0 must not be negative; give the contribution"),
        ({"backward_scores": SCORES * np.inf}, r"backward_scores\[0, 0\]=inf must be finite"),
        ({"weights": [1, 1, 1]}, r"weights has shape \(3,\)"),
        ({"devices": [1, 1]}, "devices: no subnet on device 0"),
        ({"costs": np.ones((2, 3))}, r"costs\[0\]=.* must be 0 for SHORTCUT"),
        ({"blocks": [0, -1]}, r"blocks\[1\]=-1 must be at least 0"),
        ({"tie_break": "random"}, r"tie_break='random' must be one of \('aligned', 'spread'\)"),
        ({"rng": 7}, "rng=7 must be a numpy Generator or None"),
        ({"budget": 0.6}, "budget=0.6 must be a Budget"),
        ({"budget": Budget(compute=0.2)}, "compute_budget=0.2 with 4 micro-batches: .* the nearest possible is 0.25"),
    ],
)
def test_broken_problems_do_not_exist(fields, message):
    with pytest.raises(ValueError, match=message):
        Problem(**({"forward_scores": SCORES, "backward_scores": SCORES, "budget": BUDGET} | fields))


def test_schedule_fills_in_facts_and_capacities():
    problem = zeros(4, 2, BUDGET, weights=[1, 2, 3, 4], blocks=[0, 1], devices=[0, 0])
    schedule = problem.schedule(np.zeros((4, 2), dtype=int))
    assert schedule.capacities.tolist() == [10]
    assert schedule.weights.tolist() == [1, 2, 3, 4]
    assert schedule.devices.tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"capacities\[0\]=10 is less than the load 20"):
        problem.schedule(np.full((4, 2), 2))
    with pytest.raises(ValueError, match=r"operations has shape \(2, 4\), it must have shape \(4, 2\)"):
        problem.schedule(np.zeros((2, 4), dtype=int))


def test_preference_is_by_total_score_then_index_and_immune_to_rounding():
    # Added from left to right, 0.1 + 0.2 + 0.3 is larger than 0.3 + 0.2 + 0.1 in the last bit.
    scores = np.array([[0.3, 0.2, 0.1], [0.1, 0.2, 0.3], [0.2, 0.3, 0.1], [1, 0, 0]])
    problem = Problem(scores, np.zeros((4, 3)), BUDGET)
    assert problem.preference.tolist() == [3, 0, 1, 2]
    assert replace_tie_break(problem).order(1).tolist() == [0, 1, 2, 3]


def replace_tie_break(problem):
    return Problem(problem.forward_scores, problem.backward_scores, problem.budget, tie_break="spread")


def test_pooling_keeps_the_total():
    problem = zeros(5, 3, Budget(compute=(0.2, 0.4, 0.9)))
    pooled = problem.pooled()
    assert pooled.num_devices == 1
    np.testing.assert_allclose(pooled.limits, [problem.limits.sum()])
