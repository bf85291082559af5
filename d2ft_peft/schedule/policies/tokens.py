"""The schedule under which tokens are chosen instead of micro-batches, subnets or samples."""

from ..problem import Problem
from ..schedule import Schedule
from .all_full import all_full
from .registry import register_policy


@register_policy("fewer_tokens", rows="tokens")
def fewer_tokens(problem: Problem) -> Schedule:
    """Every cell FULL: the budget is kept within the middle blocks, where only some tokens of each sample pass.

    SHORTCUT for (token, block), after random-LTD (Yao et al., arXiv 2211.11586) and PatchDropout (Liu et al., arXiv
    2208.07220). Which tokens pass is settled in the forward pass, since it depends on lengths and contents.
    """
    return all_full(problem)
