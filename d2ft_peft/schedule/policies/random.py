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
    draws = problem.rng_for("random").random(problem.forward_scores.shape)
    if problem.budget.counts is not None:
        num_full, num_forward_only = problem.budget.counts
        full, running = (
            top(draws.T, np.full(problem.num_subnets, count)).T for count in (num_full, num_full + num_forward_only)
        )
        return problem.schedule(np.where(full, Operation.FULL, running * Operation.FORWARD_ONLY))
    return problem.schedule(_by_limits(problem, draws))


def _by_limits(problem: Problem, draws: np.ndarray) -> np.ndarray:
    operations = np.empty(draws.shape, dtype=np.int8)
    owned = np.bincount(problem.devices)
    for size in np.unique(owned):
        # Devices with equally many subnets fill up together; the draws of each decide its own order.
        devices = np.flatnonzero(owned == size)
        subnets = np.stack([np.flatnonzero(problem.devices == device) for device in devices])
        order = np.argsort(draws[:, subnets].transpose(1, 0, 2).reshape(len(devices), -1), axis=1)
        rows, columns = order // size, np.take_along_axis(subnets, order % size, axis=1)
        costs = problem.weights[rows][:, :, None] * problem.limited_costs[columns]
        operations[rows, columns] = fill(costs, problem.limits[devices])
    return operations
