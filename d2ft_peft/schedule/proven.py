"""Solves many large multiple-choice knapsacks at once, and says for which of them the solution is proven to be optimal.

Greedy steps along the concave hulls leave a base and a price of a unit (see `core`). A solution that moves an item away
from the base loses what the move costs at the price. All combinations of moves of the few items that lose least are
tried. Every other solution moves some other item, so it loses at least what the best of those does; if the best
combination loses no more, counting the units that it leaves, it is optimal.

Legend: D devices, n items, R options of an item.
"""

import numpy as np

from .core import NEVER, OPTION, hull_steps


_COMBINATIONS = 160_000
"""Combinations of half of the items in a round, over all devices that are still open."""

_ROUNDS = 3
_NEVER_FITS = 1 << 38


def choose_proven(
    worth: np.ndarray, units: np.ndarray, limits: np.ndarray, within: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Solves what can be proven with little work.

    Args:
        worth: int64 [D, n, R], worth of each option, 0 for option 0; an option below 0 is forbidden.
        units: int64 [D, n, R] or, for all devices, [n, R]; cost of each option, 0 for option 0, not decreasing.
        limits: int64 [D], most that the chosen options may cost together.
        within: Share of the worth by which a solution may fall short of the optimum and count as proven.

    Returns:
        int16 [D, n], a feasible option for each item; bool [D], whether it is proven to be optimal (`within`).
    """
    units = np.broadcast_to(units, worth.shape)
    base, price, left = _relax(worth, units, limits)
    # Worth comes in multiples of a number: what the relaxation adds is lost only if it holds one.
    step = np.gcd.reduce(np.where(worth > 0, worth, 0).reshape(len(worth), -1), axis=1)
    chosen, proven = base.copy(), (price * left == 0) | (price * left * (1 + 1e-9) < step)
    tried = None
    for _ in range(_ROUNDS):
        still = np.flatnonzero(~proven)
        if not still.size or len(still) == tried:
            break
        tried = len(still)
        chosen[still], proven[still] = _best_moves(
            *(table[still] for table in (worth, units, base, price, left)), within
        )
    return chosen, proven


def _relax(worth: np.ndarray, units: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Base int16 [D, n], price of a unit float [D], units that the base leaves int64 [D]."""
    devices, n, options = worth.shape
    flat_units = units.reshape(-1, options)
    items, before, after, slopes = hull_steps(worth.reshape(-1, options), flat_units)
    if not len(items):
        return np.zeros((devices, n), dtype=OPTION), np.zeros(devices), limits.copy()
    by_device = np.argsort((items // n).astype(np.int32), kind="stable")
    items, before, after, slopes = (part[by_device] for part in (items, before, after, slopes))
    device = items // n
    rise = flat_units[items, after] - flat_units[items, before]
    steps = np.bincount(device, minlength=devices)
    starts = np.cumsum(steps) - steps
    spent = np.cumsum(rise)
    spent -= np.repeat((spent - rise)[np.minimum(starts, len(spent) - 1)], steps)
    fitting = spent <= limits[device]
    base = np.zeros(devices * n, dtype=OPTION)
    np.maximum.at(base, items[fitting], after[fitting].astype(OPTION))
    taken = np.bincount(device[fitting], minlength=devices)
    price = np.where(taken < steps, slopes[np.minimum(starts + taken, len(slopes) - 1)], 0.0)
    left = limits - np.bincount(device[fitting], rise[fitting], minlength=devices).astype(np.int64)
    return base.reshape(devices, n), price, left


def _best_moves(
    worth: np.ndarray, units: np.ndarray, base: np.ndarray, price: np.ndarray, left: np.ndarray, within: float
) -> tuple[np.ndarray, np.ndarray]:
    """The best combination of moves of the items that lose least, and whether no other item can matter."""
    devices, n, options = worth.shape
    at_base = base[:, :, None].astype(np.int64)
    gain = worth - np.take_along_axis(worth, at_base, axis=2)
    rise = units - np.take_along_axis(units, at_base, axis=2)
    rise[worth < 0], gain[worth < 0] = _NEVER_FITS, 0
    loss = np.where(np.arange(options) == at_base, np.inf, price[:, None, None] * rise - gain).min(axis=2)
    half = max(1, int(np.log(_COMBINATIONS / devices) / np.log(options)))
    size = min(n, 2 * half)
    order = np.argsort(loss, axis=1, kind="stable")
    core = np.sort(order[:, :size], axis=1)[:, :, None]
    # The first item's highest option comes first: of equal combinations it is the one that is taken.
    gain, rise = (np.take_along_axis(table, core, axis=1)[:, :, ::-1] for table in (gain, rise))
    moved, gained = _best_combination(gain, rise, left)
    chosen = base.copy()
    np.put_along_axis(chosen, core[:, :, 0], (options - 1 - moved).astype(OPTION), axis=1)
    if size == n:
        return chosen, np.ones(devices, dtype=bool)
    everyone = np.arange(devices)
    lost = price * left - gained
    value = np.take_along_axis(worth, at_base, axis=2)[:, :, 0].sum(axis=1) + gained
    # What rounding of floats could hide.
    margin = 1e-9 * (lost + price * units.max() + worth.max(axis=(1, 2)))
    return chosen, (lost + margin <= loss[everyone, order[:, size]]) | (lost + margin <= within * value)


def _best_combination(gain: np.ndarray, rise: np.ndarray, left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The options of a few items that gain most within `left`; int64 [D, items], and what they gain, [D].

    All combinations of one half of the items are sorted by what they cost; for each one of the other half the best that
    still fits is looked up.
    """
    devices, items, options = gain.shape
    everyone, half = np.arange(devices), items - items // 2
    (gains, rises), (other_gains, other_rises) = (
        [_sums(table[:, part]) for table in (gain, rise)] for part in (slice(half), slice(half, None))
    )
    by_rise = np.argsort(other_rises, axis=1, kind="stable")
    other_gains, other_rises = (np.take_along_axis(table, by_rise, axis=1) for table in (other_gains, other_rises))
    best_within = np.maximum.accumulate(other_gains, axis=1)
    # One search for all devices: each has a range of its own.
    apart = 4 * _NEVER_FITS * everyone[:, None]
    keys = (np.minimum(other_rises, _NEVER_FITS) + apart).ravel()
    room = np.maximum(left[:, None] - rises, -_NEVER_FITS) + apart
    last = np.searchsorted(keys, room, side="right") - 1 - by_rise.shape[1] * everyone[:, None]
    total = gains + np.take_along_axis(best_within, np.maximum(last, 0), axis=1)
    total[last < 0] = NEVER
    first = total.argmax(axis=1)
    fits = np.arange(by_rise.shape[1]) <= last[everyone, first][:, None]
    second = by_rise[everyone, np.where(fits, other_gains, NEVER).argmax(axis=1)]
    digits = [
        combination[:, None] // options ** np.arange(count)[::-1] % options
        for combination, count in ((first, half), (second, items - half))
    ]
    return np.concatenate(digits, axis=1), total[everyone, first]


def _sums(table: np.ndarray) -> np.ndarray:
    """Sums of every combination of one entry of each item [D, items, R], the last item's changing fastest."""
    sums = np.zeros((len(table), 1), dtype=np.int64)
    for item in range(table.shape[1]):
        sums = (sums[:, :, None] + table[:, item, None, :]).reshape(len(table), -1)
    return sums
