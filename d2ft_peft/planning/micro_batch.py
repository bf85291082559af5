"""A micro-batch, as a training loop sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..engine import Plan


@dataclass(frozen=True)
class MicroBatch:
    """What a training loop has to know of one micro-batch.

    Attributes:
        plan: Its operations.
        weight: Its share of the samples that run in this optimizer step, over all processes, times their number: the
            factor on its mean loss, so that the step's gradient is the mean over the samples that ran. A subnet that
            was FULL in some of them only gets the sum of their contributions, not scaled up.
    """

    plan: Plan
    weight: float

    @property
    def skipped(self) -> bool:
        """Whether it is not to be run at all."""
        return self.plan.skipped


def batch_size(batch: dict[str, Any]) -> int:
    """Samples in a batch: the length of its first tensor."""
    for value in batch.values():
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise ValueError(f"a batch with keys {sorted(batch)} has no tensor; micro-batches are dictionaries of tensors.")
