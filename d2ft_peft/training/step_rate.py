"""A learning rate that follows the batch which actually runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


if TYPE_CHECKING:
    from .session import TrainingSession

EXPONENTS = {"sqrt": 0.5, "linear": 1.0}


def check_steps_by_groups(field: str, value: Any, optim: str) -> None:
    """Refuse optimizers that step parameter by parameter within backward, by a rate that no group holds.

    Args:
        field: The field of `D2FTConfig` that asks for other rates.
        value: What it asks for.
        optim: The kind of optimizer, as ``TrainingArguments.optim`` has it.

    Raises:
        ValueError: It is one of them.
    """
    name = str(getattr(optim, "value", optim))
    if name.endswith(("lomo", "layerwise")):
        raise ValueError(
            f"{field}={value!r} does not reach optim={name!r}, which steps within the backward pass; choose another "
            "optimizer."
        )


class FollowBatch(TrainerCallback):
    """Scales the learning rate of each optimizer step by the share of its samples that run, to some power.

    ``rate = scheduled rate * (samples that ran / samples drawn) ** exponent``: 1/2 for adaptive optimizers (Malladi et
    al., arXiv 2205.10287), 1 for plain gradient descent (Goyal et al., arXiv 1706.02677). The rates are back as they
    were when the step is made, so that schedulers and logs know nothing of it.

    Args:
        session: Knows which samples ran, in all processes.
        rule: A key of `EXPONENTS`.
    """

    def __init__(self, session: TrainingSession, rule: str):
        self._session, self._exponent = session, EXPONENTS[rule]
        self._rates: list[Any] | None = None

    @property
    def share_that_runs(self) -> float:
        """Samples whose mean is the current step's gradient, of those that were drawn for it, in all processes."""
        planner = self._session.planner
        if planner.counts.each_is_a_step:
            return 1.0  # a batch runs as it was drawn, or its step does not run
        weights = planner.schedule.weights
        return float(weights[~planner.schedule.skipped].sum() / weights.sum())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any, **kwargs: Any
    ) -> None:
        """Scale."""
        if self._session.step_runs:
            self._rates = [group["lr"] for group in optimizer.param_groups]
            factor = self.share_that_runs**self._exponent
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any, **kwargs: Any
    ) -> None:
        """Put the rates back."""
        if self._rates is not None:
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
        self._rates = None
