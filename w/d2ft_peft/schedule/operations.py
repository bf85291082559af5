"""The three operations that a cell (micro-batch, subnet) of a schedule can have (arXiv 2504.12471, section 3)."""

from enum import IntEnum


class Operation(IntEnum):
    """What one subnet does with one micro-batch; ordered by the work it causes.

    `SHORTCUT` (p_s): only the residual passes. `FORWARD_ONLY` (p_o): the output is a constant for autograd.
    `FULL` (p_f): forward and backward.
    """

    SHORTCUT = 0
    FORWARD_ONLY = 1
    FULL = 2

    @property
    def letter(self) -> str:
        """One letter for printed schedules: S, O or F."""
        return "SOF"[self]


COMMUNICATION = (0.0, 0.5, 1.0)
"""Communication of each operation relative to FULL, indexed by `Operation`.

FULL moves activations forward and their gradients backward, FORWARD_ONLY only the former, SHORTCUT neither.
"""
