"""A micro-batch, as a training loop sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..engine import Plan


@dataclass(frozen=True)
class MicroBatch:
    """What a training loop has to know of one micro-batch.

    Attributes:
        plan: Its operations.
        weight: Its share of the samples (labels that carry loss, where they are known) that run in this optimizer
            step, over all processes, times their number: the factor on its mean loss, so that the step's gradient is
            the mean over what ran. A subnet that was FULL in some of them only gets the sum of their contributions,
            not scaled up.
        last: Whether no later one runs in this optimizer step: under DistributedDataParallel the one whose backward
            pass exchanges the gradients.
    """

    plan: Plan
    weight: float
    last: bool = True

    @property
    def skipped(self) -> bool:
        """Whether it is not to be run at all."""
        return self.plan.skipped


def batch_size(batch: Mapping[str, Any]) -> int:
    """Samples in a batch: the length of its first tensor."""
    for value in batch.values():
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise ValueError(f"a batch with keys {sorted(batch)} has no tensor; micro-batches are dictionaries of tensors.")
