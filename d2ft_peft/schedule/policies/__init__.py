"""Policies: functions from a `Problem` to a `Schedule`, known by name."""

from .all_full import all_full
from .bilevel import bilevel
from .depth import depth
from .drop_bp import drop_bp
from .dynamic_pruning import dynamic_pruning
from .joint import bilevel_gap, joint, objective
from .lisa import lisa
from .moe import moe
from .random import random
from .registry import Policy, PolicyFacts, get_policy, policy_facts, policy_names, register_policy
from .round_robin import round_robin
from .samples import exact_first, fewer_samples, importance, selective_backprop
from .stochastic_depth import stochastic_depth
from .tokens import fewer_tokens


__all__ = [
    "Policy",
    "PolicyFacts",
    "all_full",
    "bilevel",
    "bilevel_gap",
    "depth",
    "drop_bp",
    "dynamic_pruning",
    "exact_first",
    "fewer_samples",
    "fewer_tokens",
    "get_policy",
    "importance",
    "joint",
    "lisa",
    "moe",
    "objective",
    "policy_facts",
    "policy_names",
    "random",
    "register_policy",
    "round_robin",
    "selective_backprop",
    "stochastic_depth",
]
