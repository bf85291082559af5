"""Names of policies, as the configuration writes them."""

from collections.abc import Callable

from ..problem import Problem
from ..schedule import Schedule


Policy = Callable[[Problem], Schedule]
"""A policy is a function from the numbers of a step to its schedule."""

_POLICIES: dict[str, Policy] = {}
_READS: dict[str, tuple[str, ...]] = {}


def register_policy(name: str, reads: tuple[str, ...] = ()) -> Callable[[Policy], Policy]:
    """Decorator that makes a policy known under `name`.

    Args:
        name: what `D2FTConfig(policy=...)` says.
        reads: which scores the policy looks at, "backward" or "forward"; others are not computed, and are ones.

    Raises:
        ValueError: the name is taken, or `reads` names no score.
    """
    if not set(reads) <= {"backward", "forward"}:
        raise ValueError(f"reads={reads!r} must name 'backward', 'forward' or both")

    def register(policy: Policy) -> Policy:
        if name in _POLICIES:
            raise ValueError(f"policy={name!r} is already registered; choose another name than {policy_names()}")
        _POLICIES[name] = policy
        _READS[name] = tuple(reads)
        return policy

    return register


def get_policy(name: str) -> Policy:
    """The policy called `name`.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in _POLICIES:
        raise ValueError(f"policy={name!r} is unknown; choose one of {policy_names()}")
    return _POLICIES[name]


def policy_reads(name: str) -> tuple[str, ...]:
    """Which scores the policy called `name` looks at."""
    get_policy(name)
    return _READS[name]


def policy_names() -> list[str]:
    """Names of all registered policies, sorted."""
    return sorted(_POLICIES)
