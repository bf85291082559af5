"""The baseline that trains the strongest subnets on everything and leaves the others out."""

import numpy as np

from ..operations import Operation
from ..problem import Problem
from ..schedule import Schedule
from .registry import register_policy
from .units import full_where_it_fits, refuse_forward_only


@register_policy("dynamic_pruning", reads=("backward",))
def dynamic_pruning(problem: Problem) -> Schedule:
    """Subnets with the largest backward score are FULL for all micro-batches, the others SHORTCUT for all.

    Subnets are taken by score, each wherever it still fits into the *total* budget; equal scores favour the lower
    subnet. The budget is the total because a device with one subnet and less than its whole work could keep none; the
    schedule has all subnets on device 0. The choice changes with the scores, and only with them: it holds for as long
    as they are not measured anew.

    arXiv 2504.12471 compares with a baseline of this name and gives no exact definition; this one is ours.

    Raises:
        ValueError: the budget pays no subnet for all micro-batches, or counts FORWARD_ONLY cells.
    """
    refuse_forward_only(problem, "dynamic_pruning")
    pooled = problem.pooled()
    # Not a matrix product: it may round equal columns differently.
    scores = (pooled.weights[:, None] * pooled.backward_scores).sum(axis=0)
    strongest_first = np.argsort(-scores, kind="stable")
    everything = pooled.weights.sum(keepdims=True)
    what = "subnet that is FULL for all micro-batches"
    costs = pooled.limited_costs
    kept = full_where_it_fits(pooled, everything, costs, strongest_first, Operation.SHORTCUT, what)
    return pooled.schedule(np.repeat(kept * np.int8(Operation.FULL), pooled.num_micro_batches, axis=0))
