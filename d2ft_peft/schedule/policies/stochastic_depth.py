"""Skips whole blocks at random, deeper ones more often (stochastic depth, arXiv 1603.09382)."""

import numpy as np

from ..operations import Operation
from ..problem import Problem
from ..schedule import Schedule
from .registry import register_policy
from .units import block_costs, full_where_it_fits, refuse_forward_only


@register_policy("stochastic_depth")
def stochastic_depth(problem: Problem) -> Schedule:
    """All subnets of a block are FULL or SHORTCUT together; which (micro-batch, block) pairs are skipped is random.

    The chance to be skipped grows linearly with the place of the block (`skip_chances`). As many pairs are skipped as
    the *total* budget demands, no fewer: no skipped pair could still be FULL. The policy is for one machine; the
    schedule has all subnets on device 0.

    The source draws each block by itself at a fixed survival rate, for a whole mini-batch, and scales the blocks by
    that rate at test time. Here every step keeps its budget, and nothing is scaled: shortcut="rescale" acts only where
    some subnets of a block run.

    Raises:
        ValueError: the problem has no rng, or the budget counts FORWARD_ONLY cells or pays no pair.
    """
    refuse_forward_only(problem, "stochastic_depth")
    rng, pooled = problem.rng_for("stochastic_depth"), problem.pooled()
    block, costs = block_costs(pooled)
    full_cost = costs[:, Operation.FULL]
    skipped_share = max(0.0, 1 - pooled.limits[0] / (pooled.weights.sum() * full_cost.sum()))
    chances = skip_chances(full_cost, skipped_share)
    # Pareto sampling (Rosen 1997): ranks of odds of a draw over odds of its chance hit the chances at a fixed number.
    draws = rng.random((pooled.num_micro_batches, len(costs)))
    kept_first = np.argsort((draws / (1 - draws) * ((1 - chances) / chances)).ravel(), kind="stable")[::-1]
    what = "FULL block of a micro-batch"
    full = full_where_it_fits(pooled, pooled.weights, costs, kept_first, Operation.SHORTCUT, what)
    return pooled.schedule((full * np.int8(Operation.FULL))[:, block])


def skip_chances(costs: np.ndarray, share: float) -> np.ndarray:
    """Chances proportional to 1, 2, ..., B from the lowest block up, at most 1, that skip `share` of the costs.

    Where the topmost blocks reach 1, the others remain proportional to their place.

    Args:
        costs: float [B], positive.
        share: in [0, 1).

    Returns:
        float [B], in (0, 1]; tiny but not 0 for share 0, so that a ratio of chances still has a meaning.
    """
    place = np.arange(1, len(costs) + 1)
    to_skip = max(share, np.finfo(float).tiny ** 0.5) * costs.sum()
    # slopes[j]: chance per place if the blocks above the lowest j + 1 are skipped always.
    above = costs.sum() - np.cumsum(costs)
    slopes = (to_skip - above) / np.cumsum(costs * place)
    lowest_always = np.flatnonzero(slopes * place <= 1 + 1e-12)[-1]
    return np.where(place <= place[lowest_always], np.minimum(1.0, slopes[lowest_always] * place), 1.0)
