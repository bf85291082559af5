"""Names of policies, as the configuration writes them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from ...value_checks import check
from ..problem import Problem
from ..schedule import Schedule


Policy = Callable[[Problem], Schedule]
"""A policy is a function from the numbers of a step to its schedule."""

Rows = Literal["micro_batches", "samples", "tokens"]
BudgetOf = Literal["schedule", "plain"]

_POLICIES: dict[str, Policy] = {}
_FACTS: dict[str, "PolicyFacts"] = {}


@dataclass(frozen=True)
class PolicyFacts:
    """What a caller has to know of a policy.

    Attributes:
        reads: which scores it looks at, "backward" or "forward"; others are not computed, and are ones.
        rows: what a row of its problem is unless the configuration says otherwise. Samples that get the same
            operations are composed into micro-batches afterwards; under "tokens" rows are micro-batches, of whose
            samples execution leaves tokens out.
        backward_score: the backward score that it is meant for, the default of the configuration.
        budget_of: what a compute budget is a share of. "schedule": of all cells FULL, so that work which is saved
            besides (padding, unread rows) comes on top. "plain": of what plain training computes on the same batches,
            padding included, so that such savings are spent on more rows.
    """

    reads: tuple[str, ...] = ()
    rows: Rows = "micro_batches"
    backward_score: str = "weight_magnitude"
    budget_of: BudgetOf = "schedule"


def register_policy(
    name: str,
    reads: tuple[str, ...] = (),
    rows: Rows = "micro_batches",
    backward_score: str = "weight_magnitude",
    budget_of: BudgetOf = "schedule",
) -> Callable[[Policy], Policy]:
    """Decorator that makes a policy known under `name`.

    Args:
        name: what `D2FTConfig(policy=...)` says.
        reads: see `PolicyFacts`, as for the others.
        rows: what it schedules.
        backward_score: the score that it is meant for.
        budget_of: what a budget is a share of.

    Raises:
        ValueError: the name is taken, `reads` names no score, or `rows` or `budget_of` is none of what they may be.
    """
    for field, value in (("name", name), ("backward_score", backward_score)):
        check(isinstance(value, str) and value != "", field, value, "must be a name, a string that is not empty")
    if not isinstance(reads, Iterable) or not all(one in ("backward", "forward") for one in reads):
        raise ValueError(f"reads={reads!r} must name 'backward', 'forward' or both")
    if rows not in ("micro_batches", "samples", "tokens"):
        raise ValueError(f"rows={rows!r} must be 'micro_batches', 'samples' or 'tokens'")
    if budget_of not in ("schedule", "plain"):
        raise ValueError(f"budget_of={budget_of!r} must be 'schedule' or 'plain'")

    def register(policy: Policy) -> Policy:
        if name in _POLICIES:
            raise ValueError(f"policy={name!r} is already registered; choose another name than {policy_names()}")
        _POLICIES[name] = policy
        _FACTS[name] = PolicyFacts(tuple(reads), rows, backward_score, budget_of)
        return policy

    return register


def get_policy(name: str) -> Policy:
    """The policy called `name`.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in _POLICIES:
        raise ValueError(f"policy={name!r} is unknown; choose one of {policy_names()}")
    return _POLICIES[name]


def policy_facts(name: str) -> PolicyFacts:
    """What a caller has to know of the policy called `name`."""
    get_policy(name)
    return _FACTS[name]


def policy_names() -> list[str]:
    """Names of all registered policies, sorted."""
    return sorted(_POLICIES)
