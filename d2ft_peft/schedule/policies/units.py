"""What policies share that decide on more than a cell at a time: whole blocks, or whole subnets."""

import math

import numpy as np

from ..filling import first_fit
from ..knapsack import SLACK
from ..operations import Operation
from ..problem import Problem


def block_costs(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Place of each subnet's block among the blocks, lowest 0; int [K]. And limited costs of the blocks; [B, 3]."""
    present, block = np.unique(problem.blocks, return_inverse=True)
    costs = np.zeros((len(present), len(Operation)))
    np.add.at(costs, block, problem.limited_costs)
    return block, costs


def full_where_it_fits(
    pooled: Problem, sizes: np.ndarray, costs: np.ndarray, order: np.ndarray, rest: Operation, what: str
) -> np.ndarray:
    """Gives units FULL, one after another, wherever the budget of a single device still allows it.

    A unit is what a policy decides on as a whole: row i, column j costs sizes[i] * costs[j].

    Args:
        pooled: gives the limit; all its subnets are on one device.
        sizes: float [R], weight of the micro-batches of a row; their sum is that of all micro-batches.
        costs: float [C, 3], limited costs of the subnets of a column; their sum is that of all subnets.
        order: int [R * C], units (row by row) in the order in which they become FULL.
        rest: what a unit does that is not FULL.
        what: name of a unit, for the message.

    Returns:
        bool [R, C]; no further unit fits.

    Raises:
        ValueError: not even one unit fits; the message names the nearest possible budget.
    """
    raised = (sizes[:, None] * (costs[:, Operation.FULL] - costs[:, rest])).ravel()
    idle = sizes.sum() * costs[:, rest].sum()
    left = pooled.limits * (1 + SLACK) - idle
    if raised.min() > left[0]:
        raise _too_small(pooled, idle, raised.min(), rest, what)
    full = np.zeros(raised.shape, dtype=bool)
    full[order] = first_fit(raised[None, order], left)[0]
    return full.reshape(len(sizes), len(costs))


def refuse_forward_only(problem: Problem, name: str) -> None:
    """For the policy `name`, whose cells are FULL or SHORTCUT. Raises ValueError if the budget counts FORWARD_ONLY."""
    if problem.budget.num_forward_only:
        raise ValueError(
            f"num_forward_only={problem.budget.num_forward_only}: every cell of the {name} policy is FULL or SHORTCUT; "
            "the nearest possible is num_forward_only=0, or give compute_budget"
        )


def _too_small(pooled: Problem, idle: float, raised: float, rest: Operation, what: str) -> ValueError:
    """The error for a budget below idle + raised: all units at `rest`, and one of them FULL."""
    num_micro_batches, costs, budget = pooled.num_micro_batches, pooled.limited_costs, pooled.budget
    if budget.counts is None:
        full = pooled.weights.sum() * costs[:, Operation.FULL].sum()
        return budget.impossible((idle + raised) / full, num_micro_batches, what)
    per_count = pooled.weights.mean() * (costs[:, Operation.FULL] - costs[:, rest]).sum()
    num_full = max(1, math.ceil(raised / per_count * (1 - SLACK))) if raised else 1
    num_forward_only = num_micro_batches - num_full if rest == Operation.FORWARD_ONLY else 0
    return ValueError(
        f"num_full={budget.num_full} and num_forward_only={budget.num_forward_only} with {num_micro_batches} "
        f"micro-batches: no {what} fits, so nothing would train; the nearest possible is num_full={num_full} and "
        f"num_forward_only={num_forward_only}"
    )
