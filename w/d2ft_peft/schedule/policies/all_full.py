"""Plain fine-tuning as a schedule."""

from ..problem import Problem
from ..schedule import Schedule
from .registry import register_policy


@register_policy("all_full")
def all_full(problem: Problem) -> Schedule:
    """Every cell FULL, whatever scores and budget say; the schedule has no capacities."""
    return Schedule.all_full(
        problem.num_micro_batches,
        problem.num_subnets,
        weights=problem.weights,
        devices=problem.devices,
        costs=problem.costs,
        blocks=problem.blocks,
    )
