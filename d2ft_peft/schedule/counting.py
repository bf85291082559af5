"""Exact choice of FULL and FORWARD_ONLY where all items cost the same: only the two counts matter to the capacity."""

import numpy as np

from .core import OPTION


_TABLE_BYTES = 32 << 20
_NONE = -(1 << 62)


def choose_by_counts(worth: np.ndarray, full: np.ndarray, forward_only: np.ndarray) -> np.ndarray:
    """For each device the best of several pairs of counts.

    If a FORWARD_ONLY item gained more by FULL than a FULL one, swapping their options would gain the difference. So,
    sorted by that gain, some optimum has all FULL items before all FORWARD_ONLY ones; trying every split finds it.

    Args:
        worth: int64 [D, n, 3], worth of each option, 0 for option 0, not negative.
        full: int [P], numbers of FULL items to try, each at most n.
        forward_only: int [P, D], the most FORWARD_ONLY items that fit beside them, at most n - full; -1: the pair does
            not fit. At least one pair fits each device.

    Returns:
        int16 [D, n], options. Of equal pairs the first is taken, of equal items the first ones.
    """
    devices, n, _ = worth.shape
    chunk = max(1, _TABLE_BYTES // (8 * (n + 1) * (int(full.max()) + 1)))
    parts = [
        _choose(worth[start : start + chunk], full, forward_only[:, start : start + chunk])
        for start in range(0, devices, chunk)
    ]
    return np.concatenate(parts)


def _choose(worth: np.ndarray, full: np.ndarray, forward_only: np.ndarray) -> np.ndarray:
    devices, n, _ = worth.shape
    order = np.argsort(worth[:, :, 1] - worth[:, :, 2], axis=1, kind="stable")
    by_gain = np.take_along_axis(worth, order[:, :, None], axis=1).transpose(2, 1, 0)
    value, split = _best_splits(by_gain[2], by_gain[1], full, forward_only)
    best = value.argmax(axis=0)
    everyone = np.arange(devices)
    num_full, num_forward_only, split = full[best], forward_only[best, everyone], split[best, everyone]
    first = np.arange(n)[:, None] < split
    options = best_of(np.where(first, by_gain[2], -1), num_full) * OPTION(2)
    options += best_of(np.where(first, -1, by_gain[1]), num_forward_only)
    chosen = np.empty((devices, n), dtype=OPTION)
    np.put_along_axis(chosen, order, options.T.astype(OPTION), axis=1)
    return chosen


def _best_splits(
    full_worth: np.ndarray, worth: np.ndarray, full: np.ndarray, forward_only: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Best worth of each pair, and how many items lie before the split; both int64 [P, D]."""
    n, devices = worth.shape
    most = max(int(forward_only.max()), 0)
    before = np.full((n + 1, int(full.max()) + 1, devices), _NONE, dtype=np.int64)
    before[:, 0] = 0
    for item in range(n):
        np.maximum(before[item, 1:], before[item, :-1] + full_worth[item], out=before[item + 1, 1:])
    after = np.full((most + 1, devices), _NONE, dtype=np.int64)
    after[0] = 0
    counts = np.maximum(forward_only, 0)
    value = np.full(forward_only.shape, 2 * _NONE, dtype=np.int64)
    split = np.zeros(forward_only.shape, dtype=np.int64)
    for place in range(n, -1, -1):
        if place < n:
            after[1:] = np.maximum(after[1:], after[:-1] + worth[place])
        candidate = before[place, full] + np.take_along_axis(after, counts, axis=0)
        better = candidate > value
        np.copyto(value, candidate, where=better)
        np.copyto(split, place, where=better)
    value[forward_only < 0] = 2 * _NONE
    return value, split


def best_of(worth: np.ndarray, count: int | np.ndarray) -> np.ndarray:
    """Marks the `count` largest entries of each column, ties to the first; bool [n, D]."""
    rank = np.argsort(np.argsort(-worth, axis=0, kind="stable"), axis=0)
    return rank < count
