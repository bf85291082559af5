"""The baseline that treats the subnets of a block as experts behind a gate of limited capacity."""

import numpy as np

from ..knapsack import SLACK
from ..operations import Operation
from ..problem import Problem
from ..schedule import Schedule
from .registry import register_policy
from .units import refuse_forward_only


@register_policy("moe", reads=("forward",))
def moe(problem: Problem) -> Schedule:
    """Every micro-batch is FULL in its top-k subnets of every block, by forward score, and SHORTCUT in the others.

    Pairs (micro-batch, subnet) are granted from the highest forward score down, if the micro-batch has fewer than k
    subnets in the block and the subnet has room. So a full subnet holds the micro-batches that scored highest in it, a
    micro-batch that it turned away goes to its next-best subnet, and one that finds no room goes short. A subnet has
    room for its device's share of all micro-batches, by weight (with counts: for num_full of them), which keeps every
    device within its limit. k is the room in the block over the weight of all micro-batches, rounded up.

    arXiv 2504.12471 compares with a baseline of this name and gives no exact definition; this one is ours.

    Raises:
        ValueError: no subnet has room for a micro-batch, or the budget counts FORWARD_ONLY cells.
    """
    refuse_forward_only(problem, "moe")
    sizes, room = _sizes_and_room(problem)
    if sizes.min() > room.max():
        needed = problem.weights.min() / problem.weights.sum()
        raise problem.budget.impossible(needed, problem.num_micro_batches, "FULL micro-batch of any subnet")
    _, block = np.unique(problem.blocks, return_inverse=True)
    # Less the slack of the room, and its rounding: a whole number is not to be rounded up to the next.
    top_k = np.ceil(np.bincount(block, room) / sizes.sum() * (1 - 2 * SLACK)).astype(int)
    operations = np.zeros(problem.forward_scores.shape, dtype=np.int8)
    operations[_grant(problem, block, sizes, room, top_k)] = Operation.FULL
    return problem.schedule(operations)


def _sizes_and_room(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Size of each micro-batch [N], and sum of sizes that each subnet may take [K]: weights, or numbers with counts."""
    if problem.budget.counts is not None:
        return np.ones(problem.num_micro_batches), np.full(problem.num_subnets, float(problem.budget.num_full))
    costs = problem.limited_costs[:, Operation.FULL]
    room = problem.limits / np.bincount(problem.devices, costs)
    return problem.weights, room[problem.devices] * (1 + SLACK)


def _grant(
    problem: Problem, block: np.ndarray, sizes: np.ndarray, room: np.ndarray, top_k: np.ndarray
) -> tuple[list[int], list[int]]:
    """Rows and columns of the pairs that are granted."""
    num_micro_batches, num_subnets = problem.forward_scores.shape
    # place[i, k]: place of micro-batch i in the order in which the device of subnet k breaks ties.
    place = np.argsort([problem.order(device) for device in range(problem.num_devices)], axis=1)[problem.devices].T
    subnets = np.broadcast_to(np.arange(num_subnets), place.shape)
    best_first = np.lexsort((subnets.ravel(), place.ravel(), -problem.forward_scores.ravel()))
    # Every grant depends on those before it; over lists this loop is faster than numpy steps of a few numbers.
    size_of, block_of, left = sizes.tolist(), block.tolist(), room.tolist()
    wanted = [top_k.tolist() for _ in range(num_micro_batches)]
    rows, columns = [], []
    for row, column in zip(*(part.tolist() for part in np.divmod(best_first, num_subnets)), strict=True):
        if size_of[row] <= left[column] and wanted[row][block_of[column]]:
            left[column] -= size_of[row]
            wanted[row][block_of[column]] -= 1
            rows.append(row)
            columns.append(column)
    return rows, columns
