"""Policies: functions from a `Problem` to a `Schedule`, known by name."""

from .all_full import all_full
from .bilevel import bilevel
from .depth import depth
from .joint import bilevel_gap, joint, objective
from .random import random
from .registry import Policy, get_policy, policy_names, policy_reads, register_policy
from .round_robin import round_robin


__all__ = [
    "Policy",
    "all_full",
    "bilevel",
    "bilevel_gap",
    "depth",
    "get_policy",
    "joint",
    "objective",
    "policy_names",
    "policy_reads",
    "random",
    "register_policy",
    "round_robin",
]
