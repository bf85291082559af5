"""Policies that choose which samples train, each as a whole: FULL in every subnet, or not run at all.

Their rows are samples unless the configuration says micro-batches. A row that runs is what plain fine-tuning does with
it, so every gradient is exact; the least capable device decides how many rows fit.
"""

import numpy as np

from ..filling import first_fit
from ..operations import Operation
from ..problem import Problem
from ..schedule import Schedule
from .registry import register_policy


FLOOR, CAP = 0.1, 10.0
"""Least and largest score that counts in a draw, relative to the mean: no sample starves, and no outlier rules."""

SELECTIVITY = 1.0
"""Exponent beta of selective backpropagation."""


@register_policy("importance", reads=("backward",), rows="samples", backward_score="loss")
def importance(problem: Problem) -> Schedule:
    """Draws rows without replacement, each draw in proportion to the row's backward score (`FLOOR`, `CAP`).

    With the loss at a sample's last visit as the score this is online batch selection (Loshchilov and Hutter, arXiv
    1511.06343) by value instead of rank.

    Raises:
        ValueError: no row fits into the budget, or the problem has no rng.
    """
    scores = problem.backward_scores.sum(axis=1)
    mean = scores.mean() or 1.0
    return _draw("importance", problem, np.clip(scores / mean, FLOOR, CAP))


@register_policy("selective_backprop", reads=("backward",), rows="samples", backward_score="loss")
def selective_backprop(problem: Problem) -> Schedule:
    """Draws rows in proportion to the percentile of their backward score among the candidates, to a power.

    Selective backpropagation (Jiang et al., arXiv 1910.00762) runs every candidate forward to know its loss; here it is
    the loss at the last visit, and exactly as many rows run as the budget has room for.

    Raises:
        ValueError: no row fits into the budget, or the problem has no rng.
    """
    scores = problem.backward_scores.sum(axis=1)
    percentile = np.searchsorted(np.sort(scores), scores, side="right") / len(scores)
    return _draw("selective_backprop", problem, percentile**SELECTIVITY)


@register_policy("fewer_samples", rows="samples")
def fewer_samples(problem: Problem) -> Schedule:
    """Draws rows uniformly: plain fine-tuning on a random part of the samples, the judge of every other policy.

    Raises:
        ValueError: no row fits into the budget, or the problem has no rng.
    """
    return _draw("fewer_samples", problem, np.ones(problem.num_micro_batches))


@register_policy("exact_first", rows="samples", budget_of="plain")
def exact_first(problem: Problem) -> Schedule:
    """Draws rows uniformly, as many as are left when the budget was met by work that no loss ever sees.

    The order in which a budget is met is the planner's: it makes the problem's budget of what padding, unread rows and
    frozen blocks have saved so far (`d2ft_peft.planning.account`). Where they save enough, every row runs.

    Raises:
        ValueError: no row fits into the budget, or the problem has no rng.
    """
    return _draw("exact_first", problem, np.ones(problem.num_micro_batches))


def _draw(policy: str, problem: Problem, chances: np.ndarray) -> Schedule:
    """Rows [N] drawn in proportion to their chances, without replacement, wherever they still fit."""
    rng = problem.rng_for(policy)
    # Gumbel noise on log chances: the order is that of successive draws without replacement.
    order = np.argsort(-(np.log(chances) + rng.gumbel(size=len(chances))), kind="stable")
    operations = np.full(problem.forward_scores.shape, Operation.SHORTCUT, dtype=np.int8)
    if problem.budget.counts is not None:
        num_full, num_forward_only = problem.budget.counts
        operations[order[:num_full]] = Operation.FULL
        operations[order[num_full : num_full + num_forward_only]] = Operation.FORWARD_ONLY
        return problem.schedule(operations)
    # What a row may weigh in all, so that no device exceeds its limit.
    per_weight = np.bincount(problem.devices, problem.limited_costs[:, Operation.FULL])
    allowance = (problem.limits / per_weight).min(keepdims=True)
    chosen = order[first_fit(problem.weights[None, order], allowance)[0]]
    if not len(chosen):
        needed = problem.weights.min() / problem.weights.sum()
        raise problem.budget.impossible(needed, problem.num_micro_batches, "row")
    operations[chosen] = Operation.FULL
    return problem.schedule(operations)
