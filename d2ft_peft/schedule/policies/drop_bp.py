"""Drops backward passes of whole blocks, sensitive blocks less often (DropBP, arXiv 2402.17812)."""

import numpy as np

from ..operations import Operation
from ..problem import Problem
from ..schedule import Schedule
from .registry import register_policy
from .units import block_costs, full_where_it_fits


@register_policy("drop_bp", reads=("backward",))
def drop_bp(problem: Problem) -> Schedule:
    """All subnets of a block are FULL or FORWARD_ONLY together; which (micro-batch, block) pairs drop is random.

    The next pair to drop is drawn with a weight inverse to the sensitivity of its block: the sum of the backward scores
    of its subnets over all micro-batches. As many drop as the *total* budget demands, no fewer: no dropped pair could
    still be FULL. The policy is for one machine; the schedule has all subnets on device 0.

    The source drops attention and feed-forward branches apart; here a subnet joins both, so the unit is the block.
    It draws each layer by itself at a rate that keeps the budget on average; here every step keeps it.

    Raises:
        ValueError: the problem has no rng, or the budget pays no FULL pair beside FORWARD_ONLY everywhere else.
    """
    rng, pooled = problem.rng_for("drop_bp"), problem.pooled()
    block, costs = block_costs(pooled)
    # A size is summed into the score of a block, since scores are means over the samples of a micro-batch.
    sensitivity = np.bincount(block, (pooled.weights[:, None] * pooled.backward_scores).sum(axis=0))
    # Exponential draws over weights 1 / sensitivity are the moments at which pairs drop; equal ones are in any order.
    draws = rng.exponential(size=(pooled.num_micro_batches, len(costs)))
    latest_first = np.lexsort((-draws.ravel(), -(draws * sensitivity).ravel()))
    what = "FULL block of a micro-batch beside FORWARD_ONLY everywhere else"
    full = full_where_it_fits(pooled, pooled.weights, costs, latest_first, Operation.FORWARD_ONLY, what)
    return pooled.schedule(np.where(full, Operation.FULL, Operation.FORWARD_ONLY)[:, block])
