"""Who does what in a training step: numbers in, an immutable `Schedule` out. Pure numpy, never torch.

A `Problem` holds scores, costs, sizes and the `Budget` of one step; a policy turns it into a `Schedule`.
"""

from .balance import balance, balanced_total
from .budget import Budget
from .compose import Composition, compose
from .cost import Chain, CostModel
from .operations import COMMUNICATION, Operation
from .policies import bilevel_gap, get_policy, objective, policy_facts, policy_names, register_policy
from .problem import Problem
from .schedule import Schedule


__all__ = [
    "COMMUNICATION",
    "Budget",
    "Chain",
    "Composition",
    "CostModel",
    "Operation",
    "Problem",
    "Schedule",
    "balance",
    "balanced_total",
    "bilevel_gap",
    "compose",
    "get_policy",
    "objective",
    "policy_facts",
    "policy_names",
    "register_policy",
]
