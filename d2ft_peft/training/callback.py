"""D2FT in a Trainer that somebody else constructs."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .calling import calling_trainer
from .trainer import D2FTTrainerMixin


class D2FTCallback(TrainerCallback):
    """Gives a plain Trainer, or a subclass that one did not write, what `D2FTTrainer` does.

        Trainer(model=model, callbacks=[D2FTCallback()], ...)

    Callbacks see neither the batches nor the loss, so this one gives the Trainer itself the methods of
    `D2FTTrainerMixin` as soon as it is constructed. One callback serves any number of Trainers.

    Args:
        trainer: The Trainer, where it is at hand; else the one that the callback was given to.
    """

    def __init__(self, trainer: Trainer | None = None):
        if trainer is not None:
            _adopt(trainer)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adopt the Trainer that is being constructed."""
        _adopt(calling_trainer(self))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Speak if the callback came too late."""
        if not isinstance(calling_trainer(self), D2FTTrainerMixin):
            raise ValueError(
                "D2FTCallback was added to a Trainer that already exists; give it to the constructor, "
                "Trainer(..., callbacks=[D2FTCallback()]), or use trainer.add_callback(D2FTCallback(trainer))."
            )


def _adopt(trainer: Trainer) -> None:
    if not isinstance(trainer, D2FTTrainerMixin):
        cls = type(trainer)
        trainer.__class__ = type(f"D2FT{cls.__name__}", (D2FTTrainerMixin, cls), {})
