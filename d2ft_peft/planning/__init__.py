"""From the batches of a step to plans: who runs what, and what was executed."""

from .micro_batch import MicroBatch
from .planner import D2FTPlanner


__all__ = ["D2FTPlanner", "MicroBatch"]
