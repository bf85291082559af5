"""Under head-parallel execution a rank's subnets are scheduled together. No processes."""

import dataclasses

import numpy as np
import pytest

from d2ft_peft.head_parallel.rank_planner import by_rank
from d2ft_peft.schedule import Budget, Problem, get_policy


RANKS = np.array([0, 0, 1, 1, 0, 0, 1, 1])
BLOCKS = np.array([0, 0, 0, 0, 1, 1, 1, 1])


def problem(compute, seed=0):
    """Scores in which the subnets of a rank differ, as magnitudes of weights do."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(1, 2, (5, len(RANKS)))
    return Problem(scores, np.tile(scores[0], (5, 1)), Budget(compute=compute), devices=RANKS, blocks=BLOCKS)


def agreeing(schedule) -> bool:
    by_owner = [schedule.operations[:, np.flatnonzero(rank == RANKS)] for rank in np.unique(RANKS)]
    return all((operations == operations[:, :1]).all() for operations in by_owner)


@pytest.mark.parametrize("policy", ["bilevel", "joint"])
@pytest.mark.parametrize("compute", [0.6, (0.8, 0.4)])
def test_the_subnets_of_a_rank_do_the_same(policy, compute):
    alone, together = get_policy(policy), by_rank(get_policy(policy), RANKS)
    assert not agreeing(alone(problem(compute)))
    schedule = together(problem(compute))
    assert agreeing(schedule)
    np.testing.assert_allclose(schedule.loads / schedule.full_loads, np.broadcast_to(compute, 2))
    np.testing.assert_array_equal(schedule.devices, RANKS)
    np.testing.assert_array_equal(schedule.blocks, BLOCKS)


def test_a_rank_picks_the_micro_batches_that_score_highest_for_all_its_subnets():
    scores = np.ones((4, len(RANKS)))
    scores[3, RANKS == 0] = [0.9, 2, 2, 2]
    scores[1, RANKS == 1] = 2
    given = Problem(scores, scores, Budget(num_full=1), devices=RANKS, blocks=BLOCKS)
    schedule = by_rank(get_policy("bilevel"), RANKS)(given)
    assert schedule.operations[:, RANKS == 0].tolist() == [[0] * 4] * 3 + [[2] * 4]
    assert schedule.operations[:, RANKS == 1].tolist() == [[0] * 4, [2] * 4, [0] * 4, [0] * 4]


def test_a_rank_pays_for_all_its_subnets():
    ranks = np.array([0, 1, 1, 1])  # unequal: FORWARD_ONLY costs rank 1 a half of FULL, its first subnet a fifth
    costs = np.array([[0, 0.5, 1], [0, 0.2, 1], [0, 0.4, 1], [0, 0.9, 1]])
    scores = np.ones((2, 4))
    given = Problem(scores, scores, Budget(compute=0.6), costs=costs, devices=ranks, blocks=np.zeros(4, dtype=int))
    schedule = by_rank(get_policy("bilevel"), ranks)(given)
    assert schedule.operations.tolist() == [[2] * 4, [0] * 4]
    more = by_rank(get_policy("bilevel"), ranks)(dataclasses.replace(given, budget=Budget(compute=0.75)))
    assert more.operations.tolist() == [[2] * 4, [1] * 4]


def test_forward_only_goes_to_the_highest_forward_scores():
    backward, forward = np.ones((4, len(RANKS))), np.ones((4, len(RANKS)))
    backward[0], forward[2] = 2, 2
    given = Problem(forward, backward, Budget(num_full=1, num_forward_only=1), devices=RANKS, blocks=BLOCKS)
    schedule = by_rank(get_policy("bilevel"), RANKS)(given)
    assert schedule.operations[:, 0].tolist() == [2, 0, 1, 0]
