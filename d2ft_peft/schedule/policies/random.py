"""The baseline that ignores all scores: every cell draws its operation."""

import numpy as np

from ..filling import fill
from ..knapsack import top
from ..operations import Operation
from ..problem import Problem
from ..schedule import Schedule
from .registry import register_policy


@register_policy("random")
def random(problem: Problem) -> Schedule:
    """Fills every device with FULL cells in random order, then with FORWARD_ONLY cells, each wherever it still fits.

    With counts each subnet draws its num_full and num_forward_only micro-batches. Devices (with counts: subnets) draw
    independently from `problem.rng`.

    Raises:
        ValueError: the problem has no rng.
    """
    if problem.rng is None:
        raise ValueError("rng=None: the random policy needs a source of randomness; give np.random.default_rng(seed)")
    draws = problem.rng.random(problem.forward_scores.shape)
    if problem.budget.counts is not None:
        num_full, num_forward_only = problem.budget.counts
        full, running = (
            top(draws.T, np.full(problem.num_subnets, count)).T for count in (num_full, num_full + num_forward_only)
        )
        return problem.schedule(np.where(full, Operation.FULL, running * Operation.FORWARD_ONLY))
    operations = np.empty(draws.shape, dtype=np.int8)
    for device, limit in enumerate(problem.limits):
        subnets = np.flatnonzero(problem.devices == device)
        order = np.argsort(draws[:, subnets], axis=None)
        cells = problem.weights[:, None, None] * problem.limited_costs[subnets]
        cells = cells.reshape(-1, len(Operation))[order]
        chosen = np.empty(len(order), dtype=np.int8)
        chosen[order] = fill(cells[None], np.array([limit]))[0]
        operations[:, subnets] = chosen.reshape(-1, len(subnets))
    return problem.schedule(operations)
