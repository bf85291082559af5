"""Filling capacities in a given order, for policies that ignore values. Not optimal."""

import numpy as np

from .knapsack import SLACK, affordable
from .operations import Operation


def fill(costs: np.ndarray, capacities: np.ndarray) -> np.ndarray:
    """Gives items FULL in their order wherever one fits, then FORWARD_ONLY to the others wherever one fits.

    Args:
        costs: float [D, n, 3], cost of each operation of each item.
        capacities: float [D].

    Returns:
        int8 [D, n], operations.
    """
    full = first_fit(costs[:, :, Operation.FULL], capacities)
    spent = np.where(full, costs[:, :, Operation.FULL], 0.0).sum(axis=1)
    left = np.maximum(capacities - spent, 0)
    forward_only = first_fit(np.where(full, np.inf, costs[:, :, Operation.FORWARD_ONLY]), left)
    return np.where(full, Operation.FULL, forward_only * Operation.FORWARD_ONLY).astype(np.int8)


def first_fit(costs: np.ndarray, capacities: np.ndarray) -> np.ndarray:
    """Takes items in their order wherever they still fit.

    Args:
        costs: float [D, n], infinite where an item must not be chosen.
        capacities: float [D].

    Returns:
        bool [D, n].
    """
    finite = np.isfinite(costs)
    cheapest = np.where(finite, costs, np.inf).min(axis=1)
    same = (~finite | (costs == cheapest[:, None])).all()
    if same:
        count = affordable(cheapest, capacities, costs.shape[1])
        return finite & (np.cumsum(finite, axis=1) <= count[:, None])
    chosen = np.zeros(costs.shape, dtype=bool)
    left = capacities * (1 + SLACK)
    for item in range(costs.shape[1]):
        chosen[:, item] = costs[:, item] <= left
        left = left - np.where(chosen[:, item], costs[:, item], 0.0)
    return chosen
