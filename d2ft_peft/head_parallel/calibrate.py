"""Capacities in proportion to what the devices achieve, so that all of them need the same time for a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..planning.execution_counts import ExecutionCounts
from ..schedule import Schedule
from ..value_checks import is_number, numbers
from .execution import HeadParallel


def calibrate(
    parallel: HeadParallel, batches: list[dict[str, Any]], compute_budget: float = 0.6, steps: int = 3
) -> list[float]:
    """Measure how long each rank's heads take for a step that skips nothing, and share out the work accordingly.

    Every rank calls it, before training: gradients are dropped, `traffic` begins anew, weights stay as they are. Give
    the result to ``D2FTConfig(device_capacities=...)``.

    Args:
        parallel: The cut model.
        batches: Micro-batches of a usual step, the same on every rank.
        compute_budget: Share of the full compute that all ranks together may spend.
        steps: Timed steps, whose median counts; one more goes before them.

    Returns:
        Share of its own full compute that each rank may spend, [R]; the same list on every rank.

    Raises:
        ValueError: If an argument is out of range, or there are gradients that would be lost.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1, or nothing is measured.")
    if any(p.grad is not None for p in parallel.model.parameters()):
        raise ValueError("the model has gradients, which calibrate would drop; call it before training begins.")
    timeline, ranks = parallel.timeline, parallel.planner.ranks_of_subnets
    schedule = Schedule.all_full(len(batches), len(ranks))
    seconds = []
    # Exchanges that overlap with heads would take processor time from them.
    timeline.on, overlap, parallel.overlap = True, parallel.overlap, 0
    try:
        for _ in range(1 + steps):
            timeline.spans.clear()
            parallel.forward_backward(batches, schedule)
            parallel.model.zero_grad()
            seconds.append(timeline.compute_seconds)
    finally:
        timeline.spans.clear()
        timeline.on, parallel.overlap = False, overlap
    own = np.zeros(ranks.max() + 1)
    own[parallel._ranks.rank] = np.median(seconds[1:])
    of_all = parallel._ranks.sum_array(own, "check", "while calibrating", "all")
    parallel.planner.counts = ExecutionCounts()
    parallel.traffic.reset()
    return balanced_capacities(of_all, np.bincount(ranks), compute_budget)


def balanced_capacities(seconds: Sequence[float], loads: Sequence[float], compute_budget: float) -> list[float]:
    """Capacities with which all devices need the same time, as far as none has to do more than everything.

    With s_r the seconds that device r takes for all its work and l_r its share of that of the model: the capacities
    c_r = min(1, t / s_r) with the t for which sum c_r l_r = compute_budget * sum l_r.

    Args:
        seconds: Time of each device for all of its work, [R].
        loads: Work of each device, in any unit, [R].
        compute_budget: Share of all work that is to be done, in (0, 1].
    """
    alone, load = numbers("seconds", seconds), numbers("loads", loads)
    if alone.shape != load.shape or not (alone > 0).all() or not (load > 0).all():
        raise ValueError(f"seconds={list(seconds)} and loads={list(loads)} must be positive, one each per device.")
    if not is_number(compute_budget) or not 0 < compute_budget <= 1:
        raise ValueError(f"compute_budget={compute_budget} must be in (0, 1]; give the share of all-FULL work.")
    capped = np.zeros(len(alone), dtype=bool)
    while True:
        left = compute_budget * load.sum() - load[capped].sum()
        together = np.inf if capped.all() else left / (load[~capped] / alone[~capped]).sum()
        over = ~capped & (together > alone)
        if not over.any():
            return np.where(capped, 1.0, np.minimum(1.0, together / alone)).tolist()
        capped |= over
