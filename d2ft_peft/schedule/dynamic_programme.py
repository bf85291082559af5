"""Dynamic programming over whole units, for many multiple-choice knapsacks at once.

Legend: D devices, n items, R options of an item (option 0: nothing, costs 0, worth 0).
"""

import numpy as np

from .core import NEVER, OPTION


def dynamic_programme(worth: np.ndarray, units: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Solves each device exactly; ties give the first item its highest option, then the second, and so on.

    Args:
        worth: int64 [D, n, R], worth of each option; an option below 0 is forbidden.
        units: int64 [D, n, R] or, for all devices, [n, R]; cost of each option, not decreasing.
        limits: int64 [D], most that the chosen options may cost together.

    Returns:
        int16 [D, n], the option of each item.
    """
    num_devices, num_items, _ = worth.shape
    units = np.broadcast_to(units, worth.shape)
    most = int(limits.max())
    pad = min(int(units.max()), most + 1)
    units = np.minimum(units, pad)
    offered = ((worth >= 0) & (units <= most)).any(axis=0)
    low, high = _useful_units(np.where(worth >= 0, units, 0).max(axis=2), limits)
    # best[-1][pad + c, d]: most that the items so far are worth on device d within c units; NEVER below 0 units. The
    # last item enters first, so that reading the choices back starts with the one that ties prefer.
    best = [np.zeros((pad + most + 1, num_devices), dtype=np.int64)]
    best[0][:pad] = NEVER
    place = np.arange(pad, pad + most + 1)[:, None] * num_devices + np.arange(num_devices)
    for item in reversed(range(num_items)):
        without, table = best[-1], best[-1].copy()
        for choice in np.flatnonzero(offered[item, 1:]) + 1:
            cost = units[:, item, choice]
            least = int(cost.min())
            first, end = max(int(low[item]), least), int(high[item]) + 1
            if (cost == least).all():
                candidate = without[pad + first - least : pad + end - least] + worth[:, item, choice]
            else:
                candidate = without.take(place[first:end] - cost * num_devices) + worth[:, item, choice]
            np.maximum(table[pad + first : pad + end], candidate, out=table[pad + first : pad + end])
        table[pad + high[item] + 1 :] = table[pad + high[item]]
        best.append(table)
    return _read_back(best, worth, units, limits, pad)


def _read_back(
    best: list[np.ndarray], worth: np.ndarray, units: np.ndarray, limits: np.ndarray, pad: int
) -> np.ndarray:
    """The choices that lead to the last of the tables `best`, first item first."""
    num_devices, num_items, num_options = worth.shape
    chosen = np.empty((num_devices, num_items), dtype=OPTION)
    left, device = limits.copy(), np.arange(num_devices)
    for item in range(num_items):
        reached = best.pop()[pad + left, device]
        places = (pad + left[:, None] - units[:, item]) * num_devices + device[:, None]
        options = best[-1].take(places) + worth[:, item] == reached[:, None]
        chosen[:, item] = num_options - 1 - options[:, ::-1].argmax(axis=1)
        left -= units[device, item, chosen[:, item]]
    return chosen


def _useful_units(most: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and most units that can be left for item j and those after it, int64 [n] each.

    More than the costliest of these items adds nothing, so the most stands for whatever is beyond it. No fewer than
    what the items before it leave at their costliest, or, where a device had more than adds anything, than what does.

    Args:
        most: int64 [D, n], cost of the costliest option of each item.
        limits: int64 [D].
    """
    left = limits[:, None] - (np.cumsum(most, axis=1) - most)
    usable = np.cumsum(most[:, ::-1], axis=1)[:, ::-1]
    high = np.minimum(usable.max(axis=0), limits.max())
    return np.clip(np.minimum(left, usable).min(axis=0), 0, high), high
