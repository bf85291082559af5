"""Applies a knapsack to each device's own cells."""

import numpy as np

from .knapsack import choose
from .problem import Problem


def choose_per_device(
    problem: Problem, values: np.ndarray, costs: np.ndarray, capacities: np.ndarray, within: float = 0.0
) -> np.ndarray:
    """Solves one multiple-choice knapsack per device over the cells of its subnets.

    Devices with equally many subnets are solved together. Cells are offered micro-batch by micro-batch in the order
    that ties prefer, so a device that owns several subnets gets whole rows.

    Args:
        problem: gives weights, devices and the preference order.
        values: float [N, K, R], worth of each option of each cell, see `knapsack.choose`.
        costs: float [K, R], cost of each option per unit of weight.
        capacities: float [M], unit of costs * weights.
        within: see `knapsack.choose`.

    Returns:
        int8 [N, K], the option of each cell.
    """
    by_device = np.argsort(problem.devices, kind="stable")
    owned = np.split(by_device, np.cumsum(np.bincount(problem.devices))[:-1])
    sizes = np.array([len(subnets) for subnets in owned])
    chosen = np.empty(values.shape[:2], dtype=np.int8)
    for size in np.unique(sizes):
        devices = np.flatnonzero(sizes == size)
        rows = np.stack([problem.order(device) for device in devices])[:, :, None]
        columns = np.stack([owned[device] for device in devices])[:, None, :]
        cells = (len(devices), -1, values.shape[2])
        item_costs = problem.weights[rows][..., None] * costs[columns]
        options = choose(values[rows, columns].reshape(cells), item_costs.reshape(cells), capacities[devices], within)
        chosen[rows, columns] = options.reshape(len(devices), rows.shape[1], columns.shape[2])
    return chosen
