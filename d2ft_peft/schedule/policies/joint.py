"""Both operations chosen at once: the exact optimum that the paper's two levels are measured against."""

import numpy as np

from ..counting import best_of
from ..knapsack import integer_values
from ..operations import Operation
from ..per_device import choose_per_device
from ..problem import Problem
from ..schedule import Schedule
from .bilevel import bilevel
from .registry import register_policy


_ROUNDING = 1e-12

WITHIN = 0.01
"""Share of a device's optimum that `joint` may miss where it is not exact."""


def cell_values(problem: Problem) -> np.ndarray:
    """Worth of each operation in each cell; float [N, K, 3].

    SHORTCUT: 0. FORWARD_ONLY: forward score. FULL: backward score + forward score (a FULL cell also runs forward).
    """
    forward = problem.forward_scores
    return np.stack([np.zeros_like(forward), forward, forward + problem.backward_scores], axis=2)


def objective(problem: Problem, schedule: Schedule) -> float:
    """Sum over all cells of `cell_values` at the schedule's operation: what `joint` maximises, unit of the scores."""
    return float(_chosen_values(problem, schedule).sum())


def bilevel_gap(problem: Problem) -> float:
    """How much of joint's optimum the two levels of `bilevel` miss: (joint - bilevel) / joint, in [0, 1]."""
    best = objective(problem, joint(problem))
    return max(0.0, (best - objective(problem, bilevel(problem))) / best) if best > 0 else 0.0


@register_policy("joint", reads=("backward", "forward"))
def joint(problem: Problem) -> Schedule:
    """Maximises `objective`, by a multiple-choice knapsack per device.

    It is exact for micro-batches of equal size on devices whose subnets cost the same, for counts, and in problems of
    up to about a million steps of dynamic programming. Beyond, the choice of a device is worth at least 1 - `WITHIN`
    of its optimum, by a bound that is checked each time; where that fails it is exact.

    With counts: the best choice of exactly num_full FULL and num_forward_only FORWARD_ONLY micro-batches per subnet.
    Where costs are no whole multiples of a common unit the knapsack rounds them up; a device then keeps the choice of
    `bilevel` if that is worth more. A tight budget can be worth most with FORWARD_ONLY cells alone.
    """
    if problem.budget.counts is not None:
        return problem.schedule(_by_counts(problem, *problem.budget.counts))
    chosen = choose_per_device(problem, cell_values(problem), problem.limited_costs, problem.limits, WITHIN)
    schedules = problem.schedule(chosen), bilevel(problem)
    one, other = (np.bincount(problem.devices, _chosen_values(problem, schedule).sum(axis=0)) for schedule in schedules)
    worse = (other > one * (1 + _ROUNDING))[problem.devices]
    return problem.schedule(np.where(worse, schedules[1].operations, chosen)) if worse.any() else schedules[0]


def _chosen_values(problem: Problem, schedule: Schedule) -> np.ndarray:
    chosen = schedule.operations[:, :, None].astype(np.int64)
    return np.take_along_axis(cell_values(problem), chosen, axis=2)[:, :, 0]


def _by_counts(problem: Problem, num_full: int, num_forward_only: int) -> np.ndarray:
    """Splits each subnet's micro-batches, sorted by backward score, into a part for FULL and one for FORWARD_ONLY.

    If a FORWARD_ONLY cell had a higher backward score than a FULL one, swapping their operations would gain the
    difference. So some optimum has all FULL cells before all FORWARD_ONLY ones; trying every split finds it.
    """
    num_micro_batches, num_subnets = problem.forward_scores.shape
    rows = np.stack([problem.order(subnet) for subnet in range(num_subnets)], axis=1)
    columns = np.arange(num_subnets)
    by_backward = np.argsort(-problem.backward_scores[rows, columns], axis=0, kind="stable")
    rows = np.take_along_axis(rows, by_backward, axis=0)
    worth = integer_values(cell_values(problem)[rows, columns].transpose(1, 0, 2)).transpose(1, 0, 2)
    full, forward_only = worth[:, :, Operation.FULL], worth[:, :, Operation.FORWARD_ONLY]
    splits = np.arange(num_full, num_micro_batches - num_forward_only + 1)
    before = _best_sums(full, num_full)[splits]
    after = _best_sums(forward_only[::-1], num_forward_only)[num_micro_batches - splits]
    split = splits[np.argmax(before + after, axis=0)]
    first = np.arange(num_micro_batches)[:, None] < split
    operations = np.zeros((num_micro_batches, num_subnets), dtype=np.int8)
    picked_full = best_of(np.where(first, full, -1), num_full)
    picked_forward_only = best_of(np.where(first, -1, forward_only), num_forward_only)
    operations[rows, columns] = picked_full * Operation.FULL + picked_forward_only * Operation.FORWARD_ONLY
    return operations


def _best_sums(worth: np.ndarray, count: int) -> np.ndarray:
    """Entry p: sum of the `count` largest of the first p entries of each column; int64 [N + 1, K], p >= count."""
    best = np.full((count + 1, worth.shape[1]), -(1 << 62), dtype=np.int64)
    best[0] = 0
    sums = [best[count].copy()]
    for row in worth:
        best[1:] = np.maximum(best[1:], best[:-1] + row)
        sums.append(best[count].copy())
    return np.array(sums)
