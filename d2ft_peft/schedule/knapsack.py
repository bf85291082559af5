"""Exact knapsacks over integer costs, for many devices at once (arXiv 2504.12471, section 3).

Items come in the order in which ties prefer them. Among solutions of exactly equal value dynamic programming takes the
one that gives the first item its highest option, then the second, and so on; what settles large problems sooner may
take another, the same one for devices that are alike. Values are compared as integers, so equal sums are equal in
whatever order they are added.

Legend: D devices, n items, R options of an item (option 0: nothing, costs 0, worth 0).
"""

from collections.abc import Hashable, Iterable

import numpy as np

from .core import NEVER, OPTION, find_core
from .counting import choose_by_counts
from .dynamic_programme import dynamic_programme
from .proven import choose_proven


FORBIDDEN = -np.inf
"""Value of an option that must not be chosen."""

_FEWEST_UNITS, _MOST_UNITS = 4096, 1 << 14
_SMALL_DENOMINATOR = 256
_GRID_STEPS = 10_000_000
_MAX_TABLE_BYTES = 64 << 20
_FEW_TABLE_STEPS = 4_000_000
_MAX_TABLE_STEPS = 20_000_000
_MOST_COUNTED = 1024
_FEWEST_MOVES = 32
_MAX_TABLE_ITEMS = 10_000
_ROUNDED_WITHIN = 1e-3
"""Share of the worth that large problems may miss where their costs are rounded anyway."""
_VALUE_BITS = 61
_EXACT = 1e-10
SLACK = 4e-10
"""Relative excess over a capacity that counts as rounding; within the tolerance of `Schedule`."""


def choose(values: np.ndarray, costs: np.ndarray, capacities: np.ndarray, within: float = 0.0) -> np.ndarray:
    """Solves D multiple-choice knapsacks over as many items each.

    Devices that are alike are solved once; devices whose items cost the same, in whatever order, are solved together.

    Args:
        values: float [D, n, R], worth of each option; 0 for option 0, FORBIDDEN or at least 0 for the others.
        costs: float [D, n, R] or, for all devices, [n, R]; cost of each option, 0 for option 0, not decreasing.
        capacities: float [D], most that the chosen options may cost together, same unit; exceeded by at most
            5e-10 of itself where a sum rounds.
        within: share of its worth by which the choice of a device may fall short of the best one, where large problems
            are settled sooner by that; 0: by nothing.

    Returns:
        int16 [D, n], the option of each item. Optimal if `integer_costs` is exact. Else optimal (in large problems but
        for at most a thousandth of the worth) among the choices that fit with costs rounded up, then raised wherever
        the true costs leave room.
    """
    costs = np.broadcast_to(costs, values.shape)
    if values.shape[2] == 2 and (costs[:, :, 1] == costs[:, :1, 1]).all():
        return top(values[:, :, 1], affordable(costs[:, 0, 1], capacities, values.shape[1])).astype(OPTION)
    values = _on_one_scale(values)
    alike = zip(*([row.tobytes() for row in table] for table in (values, costs, capacities)), strict=True)
    first, kind = _distinct(alike)
    values, costs, capacities = values[first], costs[first], capacities[first]
    first, of_costs = _distinct(table.tobytes() for table in costs)
    of_costs = _distinct(np.unique(costs[device]).tobytes() for device in first)[1][of_costs]
    chosen = np.empty(values.shape[:2], dtype=OPTION)
    for members in (of_costs == group for group in range(of_costs.max() + 1)):
        chosen[members] = _solve(values[members], costs[members], capacities[members], within)
    return chosen[kind]


def _distinct(contents: Iterable[Hashable]) -> tuple[list[int], np.ndarray]:
    """Where each distinct content is first; and for every content which of these it equals, int64."""
    kinds, first, kind = {}, [], []
    for place, content in enumerate(contents):
        kind.append(kinds.setdefault(content, len(kinds)))
        if kind[-1] == len(first):
            first.append(place)
    return first, np.array(kind)


def _on_one_scale(values: np.ndarray) -> np.ndarray:
    """Divides by a device's largest value where its items are all worth the same, so that such devices are alike."""
    same = ((values == values.max(axis=1, keepdims=True)) | (values == FORBIDDEN)).all(axis=(1, 2))
    if not same.any():
        return values
    values = values.copy()
    values[same] /= np.maximum(values[same].max(axis=(1, 2), keepdims=True), np.finfo(float).tiny)
    return values


def _solve(values: np.ndarray, costs: np.ndarray, capacities: np.ndarray, within: float) -> np.ndarray:
    """`choose` for devices of which no two are alike, and whose costs are the same numbers in any order."""
    _, items, options = values.shape
    cells = values[:, :, 1:].size
    resolution = int(np.clip(_GRID_STEPS // cells, _FEWEST_UNITS, _MOST_UNITS))
    unit = integer_costs(costs[0], float(capacities.max()), resolution)[1]
    units = np.ceil(costs / unit * (1 - _EXACT)).astype(np.int64)
    limits = np.floor(capacities * (1 + SLACK) / unit)
    limits = np.minimum(limits, units.max(axis=2).sum(axis=1)).astype(np.int64)
    worth = integer_values(values)
    few = (limits.max() + 1) * cells <= _FEW_TABLE_STEPS
    counted = options == 3 and items <= _MOST_COUNTED and (costs == costs[0, 0]).all()
    if not few and counted and (worth >= 0).all():
        return choose_by_counts(worth, *_counts(costs[0, 0], capacities, items))
    # What does not fit even alone would mislead the relaxation.
    worth[units > limits[:, None, None]] = NEVER
    rounded = (units * unit > costs * (1 + 2 * _EXACT)).any()
    if few or (len(values) == 1 and not rounded):
        chosen = _solve_table(worth, units, limits, within)
    else:
        within = max(within, _ROUNDED_WITHIN * rounded)
        chosen, proven = choose_proven(worth, units, limits, within)
        if not proven.all():
            chosen[~proven] = _solve_table(worth[~proven], units[~proven], limits[~proven], within)
    if rounded:
        _use_what_rounding_left(chosen, values, costs, capacities)
    return chosen


def _solve_table(worth: np.ndarray, units: np.ndarray, limits: np.ndarray, within: float) -> np.ndarray:
    steps = (limits.max() + 1) * worth[:, :, 1:].size
    if steps > _MAX_TABLE_STEPS or worth.shape[1] > _MAX_TABLE_ITEMS:
        return np.stack([_choose_in_core(worth[d], units[d], int(limits[d]), within) for d in range(len(worth))])
    return _choose_in_chunks(worth, units, limits)


def _counts(costs: np.ndarray, capacities: np.ndarray, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of FULL items, most first, and how many FORWARD_ONLY ones fit beside them; see `choose_by_counts`."""
    full = np.arange(int(affordable(costs[2], capacities, items).max()), -1, -1)
    left = capacities * (1 + SLACK) - full[:, None] * costs[2]
    room = np.floor(left / costs[1]) if costs[1] > 0 else np.full(left.shape, float(items))
    return full, np.where(left < 0, -1, np.minimum(room, items - full[:, None])).astype(np.int64)


def top(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The `counts` most valuable items of each device: the 0/1 knapsack whose items all cost the same.

    With equal costs a choice is feasible if and only if it is small enough, so taking the best is exact; a stable sort
    leaves ties to the first items.

    Args:
        values: float [D, n], FORBIDDEN where an item must not be chosen.
        counts: int [D], how many items fit.

    Returns:
        bool [D, n].
    """
    order = np.argsort(-values, axis=1, kind="stable")
    chosen = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(chosen, order, np.arange(values.shape[1]) < np.asarray(counts)[:, None], axis=1)
    return chosen & (values != FORBIDDEN)


def affordable(cost: np.ndarray, capacities: np.ndarray, most: int) -> np.ndarray:
    """How many items of one cost fit into each capacity, at most `most`; int64 [D]."""
    room = np.full(len(capacities), float(most))
    np.divide(capacities * (1 + SLACK), cost, out=room, where=np.broadcast_to(cost, room.shape) > 0)
    return np.floor(np.minimum(room, most)).astype(np.int64)


def integer_costs(costs: np.ndarray, capacity: float, resolution: int) -> tuple[np.ndarray, float]:
    """Writes costs as whole numbers of a unit, rounded up where they are not.

    The unit is the largest cost / q. The smallest q that makes every cost whole (to 1e-10) is taken if there is one
    with at most 4 * `resolution` units in the capacity, or with q at most 256. Otherwise the q whose worst relative
    rounding is least, among those with at most `resolution` units in the capacity (or q at most 256). The largest cost
    itself is always exact. Rounding up never breaks a capacity.

    Args:
        costs: float, any shape, not negative.
        capacity: the largest capacity, same unit.
        resolution: about how many units the capacity may have.

    Returns:
        int64 costs of the same shape, and the unit.
    """
    largest = float(costs.max(initial=0.0))
    if largest == 0:
        return np.zeros(costs.shape, dtype=np.int64), 1.0
    ratios = np.unique(costs[costs > 0]) / largest
    fits = max(capacity / largest, 1.0)
    exact_end, grid_end = (max(_SMALL_DENOMINATOR, int(most / fits)) for most in (4 * resolution, resolution))
    best, least = 1, np.inf
    for start in range(1, exact_end + 1, 64):
        q = np.arange(start, min(start + 64, exact_end + 1))
        scaled = ratios * q[:, None]
        error = (np.ceil(scaled * (1 - _EXACT)) / scaled).max(axis=1) - 1
        exact = np.flatnonzero(error <= _EXACT)
        if exact.size:
            best = int(q[exact[0]])
            break
        error = np.where(q <= grid_end, error, np.inf)
        if error.min() < least:
            best, least = int(q[np.argmin(error)]), error.min()
    return np.ceil(costs / largest * best * (1 - _EXACT)).astype(np.int64), largest / best


def integer_values(values: np.ndarray) -> np.ndarray:
    """Scales each device's values by a power of two to int64 such that sums over its items stay below 2^62.

    A float keeps all its bits unless it is below 2^-8 of the device's total; rounding moves none by more than 2^-61 of
    the total.

    Args:
        values: float [D, n, R].

    Returns:
        int64 [D, n, R]; FORBIDDEN becomes a number below minus any sum.
    """
    forbidden = values == FORBIDDEN
    allowed = np.where(forbidden, 0.0, values)
    total = allowed.max(axis=2).sum(axis=1)
    exponent = np.where(total > 0, _VALUE_BITS - np.frexp(total)[1], 0)
    scaled = np.ldexp(allowed, exponent[:, None, None])
    return np.where(forbidden, NEVER, np.rint(scaled).astype(np.int64))


def _choose_in_chunks(worth: np.ndarray, units: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Runs the dynamic programme on as many devices at a time as the memory for its tables allows."""
    chunk = max(1, _MAX_TABLE_BYTES // (worth.shape[1] * (int(limits.max()) + 1) * worth.itemsize))
    starts = range(0, len(worth), chunk)
    tables = ([table[start : start + chunk] for table in (worth, units, limits)] for start in starts)
    return np.concatenate([dynamic_programme(*parts) for parts in tables])


def _use_what_rounding_left(chosen: np.ndarray, values: np.ndarray, costs: np.ndarray, capacities: np.ndarray) -> None:
    """Raises options in place, what gains most first, until no true cost fits any more."""
    device = np.arange(len(chosen))
    higher = np.arange(costs.shape[2]) > chosen[:, :, None]
    at_chosen = chosen[:, :, None].astype(np.int64)
    spent = np.take_along_axis(costs, at_chosen, axis=2)
    left = capacities * (1 + SLACK) - spent.sum(axis=(1, 2))
    gain, rise = values - np.take_along_axis(values, at_chosen, axis=2), costs - spent
    while True:
        gains = np.where(higher & (rise <= left[:, None, None]), gain, -1.0).reshape(len(chosen), -1)
        best = gains.argmax(axis=1)
        better = gains[device, best] >= 0
        if not better.any():
            return
        who, which, option = device[better], *np.divmod(best[better], costs.shape[2])
        left[who] -= rise[who, which, option]
        chosen[who, which] = option
        higher[who, which] = np.arange(costs.shape[2]) > option[:, None]
        gain[who, which] = values[who, which] - values[who, which, option][:, None]
        rise[who, which] = costs[who, which] - costs[who, which, option][:, None]


def _choose_in_core(worth: np.ndarray, units: np.ndarray, limit: int, within: float) -> np.ndarray:
    """One device with very many items or options: solves for the moves that lose least, for more until that is enough.

    A solution with another move loses at least what the next one does (see `core`).
    """
    core = find_core(worth, units, limit)
    everyone, tried = np.arange(len(worth)), min(_FEWEST_MOVES, len(core.items))
    base_worth = int(worth[everyone, core.base].sum())
    while tried:
        moves = core.items[:tried], core.options[:tried]
        chosen = _solve_moves(worth, units, limit, core.base, moves)
        total = int(worth[everyone, chosen].sum())
        lost = core.idle - (total - base_worth) + core.margin
        needed = int(np.searchsorted(core.losses, lost))
        if needed <= tried or lost <= within * total:
            return chosen
        tried = min(4 * tried, needed)
    return core.base


def _solve_moves(
    worth: np.ndarray, units: np.ndarray, limit: int, base: np.ndarray, moves: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """The best solution that differs from `base` by some of `moves` (items, options) alone, or better; int16 [n]."""
    offered = np.zeros(worth.shape, dtype=bool)
    offered[moves] = True
    some = np.unique(moves[0])
    offered[some, base[some]] = offered[some, 0] = True
    fixed = np.delete(np.arange(len(worth)), some)
    left = limit - int(units[fixed, base[fixed]].sum())
    left = min(left, int(np.where(offered, units, 0).max(axis=1).sum()))
    chosen = base.copy()
    some_worth = np.where(offered[some], worth[some], NEVER)
    chosen[some] = dynamic_programme(some_worth[None], units[None, some], np.array([left]))[0]
    return chosen
