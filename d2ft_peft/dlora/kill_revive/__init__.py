"""Kill-and-Revive (DLoRA, arXiv 2404.05182) on its own: k of a model's adapter modules train at a time."""

from .kill_revive import KillRevive
from .kill_revive_callback import KillReviveCallback
from .rule import Decision, KillReviveRule, KillReviveState, Observations, decide, first_state


__all__ = [
    "Decision",
    "KillRevive",
    "KillReviveCallback",
    "KillReviveRule",
    "KillReviveState",
    "Observations",
    "decide",
    "first_state",
]
