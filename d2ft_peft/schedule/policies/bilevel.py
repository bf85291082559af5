"""The paper's policy: two knapsacks, one inside the other (arXiv 2504.12471, section 3)."""

import numpy as np

from ..knapsack import FORBIDDEN, top
from ..operations import Operation
from ..per_device import choose_per_device
from ..problem import Problem
from ..schedule import Schedule
from .registry import register_policy


@register_policy("bilevel", reads=("backward", "forward"))
def bilevel(problem: Problem) -> Schedule:
    """Picks FULL cells by backward score, then FORWARD_ONLY cells by forward score from what is left.

    Per device: the outer 0/1 knapsack maximises the sum of backward scores of FULL cells within the limit; the inner
    one the sum of forward scores of FORWARD_ONLY cells among the rest, within the rest of the limit. With counts each
    subnet gets exactly num_full and num_forward_only micro-batches. Both levels are exact where costs are multiples of
    a common unit; elsewhere `knapsack.choose` says by how little a large problem may miss the optimum.
    """
    if problem.budget.counts is not None:
        return problem.schedule(_by_counts(problem, *problem.budget.counts))
    costs = problem.limited_costs
    full = _pick(problem, problem.backward_scores, costs[:, Operation.FULL], problem.limits)
    spent = np.bincount(problem.devices, (problem.weights @ full) * costs[:, Operation.FULL])
    left = np.maximum(problem.limits - spent, 0)
    scores = np.where(full, FORBIDDEN, problem.forward_scores)
    forward_only = _pick(problem, scores, costs[:, Operation.FORWARD_ONLY], left)
    return problem.schedule(_operations(full, forward_only))


def _pick(problem: Problem, scores: np.ndarray, costs: np.ndarray, capacities: np.ndarray) -> np.ndarray:
    """One level: the 0/1 knapsack over each device's cells; bool [N, K]."""
    values = np.stack([np.zeros_like(scores), scores], axis=2)
    cell_costs = np.stack([np.zeros_like(costs), costs], axis=1)
    return choose_per_device(problem, values, cell_costs, capacities) == 1


def _by_counts(problem: Problem, num_full: int, num_forward_only: int) -> np.ndarray:
    rows = np.stack([problem.order(subnet) for subnet in range(problem.num_subnets)])
    columns = np.arange(problem.num_subnets)[:, None]
    full = top(problem.backward_scores[rows, columns], np.full(problem.num_subnets, num_full))
    scores = np.where(full, FORBIDDEN, problem.forward_scores[rows, columns])
    forward_only = top(scores, np.full(problem.num_subnets, num_forward_only))
    operations = np.empty(problem.forward_scores.shape, dtype=np.int8)
    operations[rows, columns] = _operations(full, forward_only)
    return operations


def _operations(full: np.ndarray, forward_only: np.ndarray) -> np.ndarray:
    return np.where(full, Operation.FULL, np.where(forward_only, Operation.FORWARD_ONLY, Operation.SHORTCUT))
