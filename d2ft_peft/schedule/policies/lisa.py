"""Trains a few random blocks at a time (LISA, arXiv 2403.17919)."""

import numpy as np

from ..operations import Operation
from ..problem import Problem
from ..schedule import Schedule
from .registry import register_policy
from .units import block_costs, full_where_it_fits


@register_policy("lisa")
def lisa(problem: Problem) -> Schedule:
    """A few random blocks are FULL for all micro-batches, all others FORWARD_ONLY; drawn anew every interval.

    Blocks are drawn uniformly from `problem.interval_rng()`, and each becomes FULL if the *total* budget still allows
    it. The policy is for one machine; the schedule has all subnets on device 0.

    The source gives the number of blocks instead of a budget, and its frozen blocks still pass the whole gradient on;
    behind a FORWARD_ONLY block only the residual does. It always trains embeddings and head, which are no subnets here.

    Raises:
        ValueError: the budget does not pay one FULL block beside FORWARD_ONLY everywhere else.
    """
    pooled = problem.pooled()
    block, costs = block_costs(pooled)
    drawn = pooled.interval_rng().permutation(len(costs))
    everything = pooled.weights.sum(keepdims=True)
    what = "FULL block beside FORWARD_ONLY everywhere else"
    full = full_where_it_fits(pooled, everything, costs, drawn, Operation.FORWARD_ONLY, what)
    row = np.where(full, Operation.FULL, Operation.FORWARD_ONLY)[:, block]
    return pooled.schedule(np.repeat(row, pooled.num_micro_batches, axis=0))
