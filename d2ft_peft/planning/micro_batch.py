"""A micro-batch, as a training loop sees it."""

from __future__ import annotations

from dataclasses import dataclass

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
