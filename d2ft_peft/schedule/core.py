"""Settles most items of a large multiple-choice knapsack, so that dynamic programming remains for a small core.

The linear relaxation is solved greedily: every item climbs the concave hull of its options, steepest step first, until
one step does not fit. Its slope is the price of a unit; what it leaves is the base. Two exact arguments then show that
some optimal solution differs from the base only in the core:

- Price. Moving an item away from the base loses value, counted at the price. No optimal solution can lose more than
  the gap between the relaxation's bound and a solution at hand.
- Proximity. Let `span` be the largest cost. A solution whose cost changes against the base contain a part that sums to
  zero can undo that part without loss. Ordered such that their running sum stays within one span of zero, changes
  without such a part are fewer than 2 * span. Among items with equal costs and equal base option it is the ones
  that gain most (lose least) which move. So 2 * span items of each such kind suffice.
"""

from dataclasses import dataclass

import numpy as np


OPTION = np.int16
"""Type of the number of an option: a policy may offer more than 127."""

NEVER = -(1 << 62)
"""Worth of an option that must not be chosen: below minus any sum."""


@dataclass(frozen=True)
class Core:
    """A feasible greedy solution and the moves by which an optimal one may differ from it.

    Attributes:
        base: int16 [n], an option for each item.
        items, options: int64 [moves], the moves, those that lose least first. Some optimal solution differs from the
            base only by them; without any the base is optimal.
        losses: float [moves], worth that they lose, counting units at the price; not decreasing.
        idle: float, worth at the price of the units that the base leaves.
        margin: float, what rounding could hide in a sum of losses.
    """

    base: np.ndarray
    items: np.ndarray
    options: np.ndarray
    losses: np.ndarray
    idle: float
    margin: float


def find_core(worth: np.ndarray, units: np.ndarray, limit: int) -> Core:
    """Finds a greedy solution and the moves by which an optimal one may differ from it.

    Args:
        worth: int64 [n, R], worth of each option, 0 for option 0; an option below 0 is forbidden.
        units: int64 [n, R], cost of each option, 0 for option 0, not decreasing.
        limit: most that the chosen options may cost together.
    """
    items, before, after, slopes = hull_steps(worth, units)
    base = np.zeros(len(worth), dtype=OPTION)
    rise = units[items, after] - units[items, before]
    fitting = np.cumsum(rise) <= limit
    # The cumulated cost does not decrease, so what fits is a prefix; an item's steps lie in it in ascending order.
    np.maximum.at(base, items[fitting], after[fitting].astype(OPTION))
    rest = int(fitting.sum())
    none = np.empty(0, dtype=np.int64)
    if rest == len(items):
        return Core(base, none, none, none, 0.0, 0.0)
    left = limit - int(rise[:rest].sum())
    greedy, gained = _fill(base, worth, units, left, (items[rest:], before[rest:], after[rest:]))
    price = float(slopes[rest])
    if left == 0 or price == 0:
        return Core(greedy, none, none, none, 0.0, 0.0)
    gap = price * left - gained
    loss = price * (units - units[np.arange(len(worth)), base][:, None])
    loss -= worth - worth[np.arange(len(worth)), base][:, None]
    # Floats only widen the core: what rounding could hide is at most this.
    margin = 1e-9 * (abs(gap) + price * int(units.max()) + float(worth.max()))
    moves = _open_moves(base, worth, units, loss <= gap + margin)
    losses = loss[moves]
    by_loss = np.argsort(losses, kind="stable")
    return Core(base, *(part[by_loss] for part in np.nonzero(moves)), losses[by_loss], price * left, margin)


def hull_steps(worth: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All steps along the items' concave hulls, steepest first; ties: first item, lower step."""
    everyone = np.arange(len(worth))
    option = np.zeros(len(worth), dtype=np.int64)
    bound = np.full(len(worth), np.inf)
    steps = []
    for _ in range(worth.shape[1] - 1):
        gain = (worth - worth[everyone, option][:, None]).astype(np.float64)
        rise = units - units[everyone, option][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = np.where(rise > 0, gain / rise, np.where(gain > 0, np.inf, 0.0))
        slope[(gain < 0) | (np.arange(worth.shape[1]) <= option[:, None])] = -1.0
        following = np.argmax(slope, axis=1)
        slope = slope[everyone, following]
        moves = slope >= 0
        # Slopes fall along a hull; where rounding says otherwise, the order of the steps must still hold.
        bound = np.where(moves, np.minimum(bound, slope), bound)
        steps.append((everyone[moves], option[moves], following[moves], bound[moves]))
        option = np.where(moves, following, option)
    items, before, after, slopes = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    order = np.lexsort((before, items, -slopes))
    return items[order], before[order], after[order], slopes[order]


def _fill(base: np.ndarray, worth: np.ndarray, units: np.ndarray, left: int, steps: tuple) -> tuple[np.ndarray, int]:
    """Takes further steps that fit, in their order; returns the options and the worth gained."""
    greedy, gained = base.copy(), 0
    items, before, after = steps
    rise = units[items, after] - units[items, before]
    for step in np.flatnonzero(rise <= left):
        if left == 0:
            break
        item = items[step]
        if rise[step] <= left and greedy[item] == before[step]:
            greedy[item] = after[step]
            left -= int(rise[step])
            gained += int(worth[item, after[step]] - worth[item, before[step]])
    return greedy, gained


def _open_moves(base: np.ndarray, worth: np.ndarray, units: np.ndarray, cheap: np.ndarray) -> np.ndarray:
    """Moves away from the base that both arguments leave open, of those that are `cheap`; bool [n, R]."""
    gain = worth - worth[np.arange(len(worth)), base][:, None]
    open_moves = (worth >= 0) & cheap & (np.arange(worth.shape[1]) != base[:, None])
    some = np.flatnonzero(open_moves.any(axis=1))
    kind = np.zeros(len(worth), dtype=np.int64)
    kind[some] = np.unique(np.column_stack([units, base])[some], axis=0, return_inverse=True)[1].ravel()
    core = np.zeros(worth.shape, dtype=bool)
    for target in np.flatnonzero(open_moves.any(axis=0)):
        candidates = np.flatnonzero(open_moves[:, target])
        # Equal gains: the first items climb, the last ones descend.
        preference = np.where(target > base[candidates], candidates, -candidates)
        candidates = candidates[np.lexsort((preference, -gain[candidates, target], kind[candidates]))]
        starts = np.flatnonzero(np.r_[True, np.diff(kind[candidates]) != 0])
        lengths = np.diff(np.r_[starts, len(candidates)])
        rank = np.arange(len(candidates)) - np.repeat(starts, lengths)
        core[candidates[rank < 2 * int(units.max())], target] = True
    return core
