"""Which trainers generate what they train on, and which of them D2FT follows.

A schedule is made before a step runs, of micro-batches that are there. TRL's GRPO and RLOO make theirs in
`_prepare_inputs`, which `Rollouts` calls earlier; others mix generation, losses and state of their own.
"""

from __future__ import annotations

from transformers import Trainer


FOLLOWED = {"trl.trainer.grpo_trainer": "GRPOTrainer", "trl.trainer.rloo_trainer": "RLOOTrainer"}
"""Classes whose way of generating is followed, by their module."""

# What TRL's trainers override to generate within a step, or to train on what is generated beside it.
_SIGNS = ("_prepare_inputs", "_inner_training_loop")
_IN_TRAINING_STEP = {"OnlineDPOTrainer"}


def generator(trainer: Trainer) -> str | None:
    """Name of the class by which a trainer generates its inputs in the way that is followed, or None."""
    names = (cls.__name__ for cls in type(trainer).__mro__ if FOLLOWED.get(cls.__module__) == cls.__name__)
    return next(names, None)


def check_generation(trainer: Trainer) -> None:
    """Refuse trainers of TRL that generate what they train on in another way.

    Raises:
        ValueError: If the trainer is one, or one by its arguments.
    """
    if generator(trainer) is not None:
        return
    for cls in type(trainer).__mro__:
        if not cls.__module__.startswith("trl."):
            continue
        if cls.__name__ in _IN_TRAINING_STEP or any(sign in vars(cls) for sign in _SIGNS):
            raise ValueError(
                f"{cls.__name__} generates what it trains on in the middle of a step, so that there is nothing to "
                "schedule beforehand (GRPOTrainer and RLOOTrainer are followed); leave D2FT's callback or mixin out, "
                "and the adapter trains as a whole."
            )
        if cls.__name__ == "GKDTrainer" and (trainer.lmbda > 0 or trainer.seq_kd):
            raise ValueError(
                f"GKDTrainer with lmbda={trainer.lmbda} and seq_kd={trainer.seq_kd} exchanges completions in the "
                "middle of a step for generated ones, of which D2FT knows neither lengths nor labels; set lmbda=0 and "
                "seq_kd=False, or leave D2FT's callback or mixin out, and the adapter trains as a whole."
            )
