"""The deterministic spread: every subnet trains on other micro-batches, all with equal load."""

import numpy as np

from ..filling import fill
from ..operations import Operation
from ..problem import Problem
from ..schedule import Schedule
from .registry import register_policy


@register_policy("round_robin")
def round_robin(problem: Problem) -> Schedule:
    """Subnet k does micro-batch i FULL if (i + k) mod N < num_full, then come its FORWARD_ONLY ones, then SHORTCUT.

    Without counts, num_full and num_forward_only follow from the budget: every subnet may do its device's share of its
    own all-FULL work. With unequal weights a subnet goes through its micro-batches in that order and takes what fits.

    Raises:
        ValueError: no subnet could do a whole micro-batch FULL; the message names the nearest possible budget.
    """
    num_micro_batches, num_subnets = problem.forward_scores.shape
    subnets = np.arange(num_subnets)
    place = np.arange(num_micro_batches)
    if problem.budget.counts is not None:
        num_full, num_forward_only = problem.budget.counts
        by_place = np.where(place < num_full, Operation.FULL, (place < num_full + num_forward_only) * 1)
        return problem.schedule(by_place[(place[:, None] + subnets) % num_micro_batches])
    micro_batch = (place - subnets[:, None]) % num_micro_batches
    costs = problem.weights[micro_batch][:, :, None] * problem.limited_costs[:, None, :]
    full_costs = costs[:, :, Operation.FULL].sum(axis=1)
    shares = problem.limits / np.bincount(problem.devices, full_costs)
    chosen = fill(costs, shares[problem.devices] * full_costs)
    if not (chosen == Operation.FULL).any():
        needed = problem.weights.min() / problem.weights.sum()
        raise problem.budget.impossible(needed, num_micro_batches, "FULL micro-batch of any subnet")
    operations = np.empty((num_micro_batches, num_subnets), dtype=np.int8)
    operations[micro_batch, subnets[:, None]] = chosen
    return problem.schedule(operations)
