"""Names of policies, as the configuration writes them."""

from collections.abc import Callable

from ..problem import Problem
from ..schedule import Schedule


Policy = Callable[[Problem], Schedule]
"""A policy is a function from the numbers of a step to its schedule."""

_POLICIES: dict[str, Policy] = {}


def register_policy(name: str) -> Callable[[Policy], Policy]:
    """Decorator that makes a policy known under `name`.

    Raises:
        ValueError: the name is taken.
    """

    def register(policy: Policy) -> Policy:
        if name in _POLICIES:
            raise ValueError(f"policy={name!r} is already registered; choose another name than {policy_names()}")
        _POLICIES[name] = policy
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


def policy_names() -> list[str]:
    """Names of all registered policies, sorted."""
    return sorted(_POLICIES)
