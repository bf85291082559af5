"""One depth per micro-batch: gradients that are computed are exact."""

import numpy as np

from ..knapsack import choose
from ..operations import Operation
from ..problem import Problem
from ..schedule import Schedule
from .registry import register_policy


@register_policy("depth", reads=("backward", "forward"))
def depth(problem: Problem) -> Schedule:
    """Each micro-batch is FULL from some block up and FORWARD_ONLY below, or skipped as a whole.

    Such rows are closed upwards, so every FULL cell has the exact gradient (`Schedule.exact_gradients`). A depth is
    worth the backward scores of its FULL cells plus the forward scores of the whole row; at least the top block is
    FULL in a row that runs. A multiple-choice knapsack (`knapsack.choose`) over micro-batches picks the depths
    within the *total* budget: the policy is for one machine, the schedule has all subnets on device 0. It is exact
    where `knapsack.integer_costs` is; elsewhere costs are rounded up, and a large problem may miss a thousandth.

    Raises:
        ValueError: no micro-batch fits into the budget.
    """
    pooled = problem.pooled()
    ladder = np.unique(pooled.blocks)[::-1]
    # is_full[d, k]: subnet k is FULL if a row is FULL in its d+1 top blocks.
    is_full = pooled.blocks[None, :] >= ladder[:, None]
    costs = pooled.limited_costs
    row_costs = np.where(is_full, costs[:, Operation.FULL], costs[:, Operation.FORWARD_ONLY]).sum(axis=1)
    item_costs = pooled.weights[:, None] * np.concatenate([[0.0], row_costs])
    # As cells of one block after another, so that equal rows have equal sums.
    by_block = np.stack([pooled.backward_scores[:, pooled.blocks == block].sum(axis=1) for block in ladder], axis=1)
    running = pooled.forward_scores.sum(axis=1, keepdims=True)
    values = np.concatenate([np.zeros_like(running), running + np.cumsum(by_block, axis=1)], axis=1)
    order = pooled.order(0)
    depths = np.empty(pooled.num_micro_batches, dtype=np.int64)
    depths[order] = choose(values[None, order], item_costs[order], pooled.limits)[0]
    if not depths.any():
        full = pooled.weights.sum() * costs[:, Operation.FULL].sum()
        raise pooled.budget.impossible(item_costs[:, 1].min() / full, pooled.num_micro_batches, "micro-batch")
    rows = np.where(is_full, Operation.FULL, Operation.FORWARD_ONLY)
    rows = np.concatenate([np.full((1, pooled.num_subnets), Operation.SHORTCUT), rows])
    return pooled.schedule(rows[depths])
