"""Kill-and-Revive in a Trainer that somebody else constructs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...training.calling import calling_trainer
from .adapted_modules import unwrap
from .kill_revive import KillRevive, release
from .rule import Decision, KillReviveRule, KillReviveState, Observations


class KillReviveCallback(TrainerCallback):
    """Trains k of a model's adapter modules at a time, in any Trainer.

        Trainer(model=model, callbacks=[KillReviveCallback(active=16, interval=0.25, unit="epochs")], ...)

    After each decision the Trainer logs ``kr_active``, ``kr_killed`` and ``kr_revived`` (numbers of modules), and
    ``kr_share`` (values that train, as a share of those of all modules). Checkpoints hold the state in the optimizer's
    file. When training ends, all modules are trainable again.

    Args:
        plot: Draw which modules were active into ``kill_revive.png`` in the Trainer's output folder; needs matplotlib.
        on_change: As in `KillRevive`.
        decide: As in `KillRevive`.
        **rule: Fields of `KillReviveRule`: ``active``, ``interval``, ``unit``, ``idle``, ...

    Attributes:
        kill_revive: What the current or last call of ``train()`` used; None before the first.
    """

    def __init__(
        self,
        *,
        plot: bool = False,
        on_change: Callable[[list[str], list[str]], None] | None = None,
        decide: Callable[[KillReviveRule, KillReviveState, Observations], Decision] | None = None,
        **rule: Any,
    ):
        self.rule, self._draw = KillReviveRule(**rule), _drawing() if plot else None
        self.kill_revive: KillRevive | None = None
        self._more = {"on_change": on_change, "decide": decide}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Undo what a broken run left frozen, before an optimizer is made of what is trainable."""
        if model is not None:
            release(unwrap(model)[0])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Kill, or go on as a checkpoint says."""
        trainer = calling_trainer(self)
        for engine in ("deepspeed", "fsdp"):
            if getattr(trainer, f"is_{engine}_enabled", False):
                raise ValueError(
                    f"Kill-and-Revive cannot freeze modules one by one under {engine}; use one process, or "
                    "DistributedDataParallel."
                )
        if self.kill_revive is not None:
            self.kill_revive.close()
        self.kill_revive = KillRevive(
            trainer.model_wrapped, trainer.optimizer, steps_per_epoch=_steps_per_epoch(args, **kwargs),
            resume=state.global_step > 0, **self._more, **vars(self.rule),
        )  # fmt: skip

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count a step, and log a decision."""
        kill_revive = self.kill_revive
        before = set(kill_revive.state.active)
        if kill_revive.step():
            now = set(kill_revive.state.active)
            due = control.should_log  # which any entry sets back, and this one is no substitute for the loss
            calling_trainer(self).log({
                "kr_active": len(now), "kr_killed": len(before - now), "kr_revived": len(now - before),
                "kr_share": kill_revive.share,
            })  # fmt: skip
            control.should_log = due

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let all modules be trainable again, and draw."""
        self.kill_revive.close()
        if self._draw is not None and state.is_world_process_zero:
            activity, began = self.kill_revive.activity
            self._draw(activity, self.kill_revive.names, Path(args.output_dir) / "kill_revive.png", began)


def _drawing() -> Callable[..., Path]:
    """What draws; asked for before training, so that a missing matplotlib does not show at its end."""
    from ...report import plot_activity

    return plot_activity


def _steps_per_epoch(args: TrainingArguments, train_dataloader: Any = None, **kwargs: Any) -> int | None:
    """Optimizer steps in an epoch; None if nobody knows its length."""
    try:
        return max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
    except TypeError:
        return None
