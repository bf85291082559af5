"""Trainers that generate completions within their steps (TRL's GRPO and RLOO): made before the step is scheduled.

Such a trainer's data loader gives prompts, and `_prepare_inputs` turns them into what the loss is computed on: it
generates, computes log-probabilities before the update and of the reference, and rewards. All of that is done here with
the whole model, for all micro-batches of an optimizer step before the first of them runs; what is scheduled is the
forward and backward pass of the loss. The model does not change in between, so that it is what the trainer would do.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer

from ..partition import base_model
from ..planning import D2FTPlanner
from ..planning.candidates import Candidates
from ..planning.facts import BatchFacts
from ..processes import all_reduce, world_size
from .generating import FOLLOWED, generator
from .rollout_rows import Rows, join_rows, num_loss_tokens, num_tokens, take_rows, width


# Rotations that depend on how far tokens lie apart, not on how long the sequence is.
_RELATIVE = {"default", "linear", "llama3", "yarn"}


class Rollouts:
    """What such a trainer generates for one optimizer step.

    Args:
        trainer: The trainer.
        planner: Its planner.

    Attributes:
        resumed: The checkpoint that the run goes on from, until its random state is loaded.

    Raises:
        ValueError: If the configuration asks for what there is not for completions that are new in every step.
    """

    def __init__(self, trainer: Trainer, planner: D2FTPlanner):
        self.trainer, self.planner = trainer, planner
        self._check()
        self._cuts = planner.config.padding != "keep"
        self._cuts_prompts = self._cuts and _sees_distances_only(base_model(planner.model).config)
        self._share = self._tokens = 1.0
        self.resumed: str | None = None
        self._ahead = False

    def _check(self) -> None:
        name, config, source = generator(self.trainer), self.planner.config, self.planner.source
        if source.by_sample:
            score = next(name for name in source.names if name in (*source.live, *source.before_training))
            raise ValueError(
                f"policy={config.policy!r} reads the score {score!r} of every sample, and {name} generates new ones in "
                "every step; choose a policy that reads none (exact_first, fewer_samples), or "
                "backward_score='weight_magnitude'."
            )
        if config.padding == "flatten":
            raise ValueError(
                f"padding='flatten' lays the samples of a data set in one row, and {name} generates its own; leave "
                "padding out, which cuts columns of padding off, or set padding='keep'."
            )
        if config.is_auto:
            raise ValueError(
                f"device_capacities='auto' gives processes different numbers of samples, and {name} gathers figures of "
                "every micro-batch from all of them; leave it out."
            )
        if self.planner.tokens is not None:
            raise ValueError(
                f"policy={config.policy!r} leaves out tokens, whose log-probabilities {name} needs; choose a policy "
                "over samples (exact_first, fewer_samples) or heads."
            )
        if config.cache_frozen is not None:
            raise ValueError(
                f"cache_frozen={config.cache_frozen!r} keeps what blocks return of samples that come again, and {name} "
                "generates new ones in every step; leave it out."
            )
        if config.head_start is True:
            raise ValueError(
                f"head_start=True fits a new head to labels of the training samples, and {name} has none; leave it out."
            )
        if self.trainer.args.gradient_accumulation_steps == 1 and not self.planner.schedules_samples:
            raise ValueError(
                f"policy={config.policy!r} schedules several micro-batches together, and with "
                f"gradient_accumulation_steps=1 {name} generates each with another model; set it to at least 2, or "
                "choose a policy over samples (exact_first, fewer_samples)."
            )

    def generate(self, batches: Sequence[Any]) -> list[Rows]:
        """Inputs of an optimizer step's micro-batches, as the trainer makes them when it comes to each.

        Args:
            batches: What the data loader gave.
        """
        trainer, began, first = self.trainer, time.perf_counter(), self.trainer._step
        if self.resumed is not None:  # the Trainer loads it after the batches are there, which is too late here
            trainer._load_rng_state(self.resumed)
            self._ahead = True
        trainer.model_wrapped.train()  # as `Trainer.training_step` does: evaluation may have come before
        if callable(getattr(trainer.optimizer, "train", None)):
            trainer.optimizer.train()
        prepared = []
        for number, batch in enumerate(batches):
            trainer._step = first + number  # by which it knows when to generate, and which of what it generated is due
            prepared.append(dict(trainer._prepare_inputs(batch)))
        trainer._step = first
        trainer._current_train_step_time += time.perf_counter() - began
        return prepared

    def takes_random_state(self) -> bool:
        """Whether the random state of a checkpoint is to be loaded: not again after completions were drawn from it."""
        ahead, self._ahead, self.resumed = self._ahead, False, None
        return not ahead

    def count(self, batches: int, running: int) -> None:
        """Let the trainer count so many micro-batches in this step, although it runs another number of them."""
        self.trainer._step += batches - running

    def facts(self, batch: Rows) -> BatchFacts:
        """What planning has to know of a micro-batch."""
        prompts, completions = num_tokens(batch)
        return BatchFacts(len(prompts), length=width(batch), tokens=int(prompts.sum() + completions.sum()))

    @staticmethod
    def model_inputs(batch: Rows) -> dict[str, Tensor]:
        """The model's own inputs, by which it is looked at."""
        pairs = {"input_ids": ("prompt_ids", "completion_ids"), "attention_mask": ("prompt_mask", "completion_mask")}
        return {name: torch.cat([batch[one] for one in both], dim=1) for name, both in pairs.items()}

    def compose(self, batches: Sequence[Rows]) -> list[Rows]:
        """Schedule the completions of a step; returns the micro-batches that run, in the order of their schedule."""
        rows = join_rows(batches)
        matter, size = self._matter(rows), max(len(batch["prompt_ids"]) for batch in batches)
        everyone = Candidates(np.arange(len(matter)), size)
        if self._cuts and world_size() == 1:  # the trainer gathers figures of as many rows from every process
            prompts, completions = num_tokens(rows)
            longest = prompts.max() if self._cuts_prompts else rows["prompt_ids"].shape[1]
            plain = tuple((float(len(batch["prompt_ids"])), width(batch)) for batch in batches)
            everyone = Candidates(everyone.indices, size, longest + np.maximum(completions, 1), plain)
        chosen = np.flatnonzero(matter)
        lengths = None if everyone.lengths is None else everyone.lengths[chosen]
        groups = self.planner.compose(Candidates(chosen, size, lengths, everyone.batches), size)
        groups = [chosen[group] for group in groups]
        tokens = num_loss_tokens(rows)
        self._share = len(chosen) / len(matter)
        self._note_tokens(sum(tokens[group].sum() for group in groups), tokens[chosen].sum())
        return [take_rows(rows, group, self._cuts, self._cuts_prompts) for group in groups]

    def note(self, batches: Sequence[Rows], running: set[int]) -> None:
        """These micro-batches were scheduled as a whole, and some of them run."""
        tokens = np.array([num_loss_tokens(batch).sum() for batch in batches])
        self._share = 1.0
        self._note_tokens(tokens[sorted(running)].sum(), tokens.sum())

    def _note_tokens(self, ran: float, whole: float) -> None:
        ran, whole = all_reduce(np.array([ran, whole], dtype=float))
        self._tokens = ran / whole if ran else 1.0

    def _matter(self, rows: Rows) -> np.ndarray:
        """Which completions have a gradient at all, bool [n]; at least one of them. Asked only where a budget is met by
        exact savings first, and of TRL's own losses.

        One without an advantage (all of its group had the same reward) adds nothing to them, nor does one that was
        masked since it was cut off: but for terms that do not look at advantages.
        """
        trainer, everything = self.trainer, np.ones(len(rows["prompt_ids"]), dtype=bool)
        of_trl = inspect.unwrap(type(trainer)._compute_loss).__module__ in FOLLOWED
        exact_first = self.planner.account is not None and world_size() == 1
        if not (exact_first and of_trl) or trainer.aux_loss_enabled:
            return everything
        matter = num_loss_tokens(rows) > 0
        in_rewards = "old_logps" in rows  # where RLOO has its divergence from the reference
        if (trainer.beta == 0 or in_rewards) and not getattr(trainer, "_entropy_bonus_enabled", False):
            advantages = rows["advantages"]
            matter &= (advantages != 0).reshape(len(matter), -1).any(dim=1).cpu().numpy()
        if not matter.any():
            matter[0] = True  # a step without a gradient is a step: momentum and weight decay go on
        return matter

    def weight(self, weight: float) -> float:
        """What a micro-batch counts in the mean over what ran, and what had no gradient to begin with.

        Args:
            weight: What it counts in the mean over what ran.
        """
        return weight * self._share

    @contextmanager
    def as_part(self, weight: float, inputs: Rows) -> Iterator[Rows]:
        """Let a trainer whose loss is divided by the number of micro-batches, or by the tokens of the step, count one
        as `weight` of the step, and only the tokens that ran.

        Args:
            weight: What it counts in the mean over what ran.
            inputs: Its inputs; yields those that its loss is to see.
        """
        trainer = self.trainer
        if not trainer.loss_is_scaled_for_ga:  # the Trainer divides it
            yield inputs
            return
        usual, parts = trainer.current_gradient_accumulation_steps, 1 / weight
        parts = round(parts) if abs(parts - round(parts)) < 1e-9 else parts
        factor = usual / parts * self._tokens
        if factor != 1 and "num_items_in_batch" in inputs:
            inputs = {**inputs, "num_items_in_batch": inputs["num_items_in_batch"] * factor}
        trainer.current_gradient_accumulation_steps = parts
        try:
            yield inputs
        finally:
            trainer.current_gradient_accumulation_steps = usual


def _sees_distances_only(config: Any) -> bool:
    """Whether a model's positions are rotations by distances, so that columns of padding before all prompts may go."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds, absolute = set(), getattr(text, "attention_chunk_size", None) is not None

    def look(parameters: Any) -> None:
        nonlocal absolute
        if isinstance(parameters, Mapping):
            kinds.update([parameters["rope_type"]] if "rope_type" in parameters else [])
            absolute |= "llama_4_scaling_beta" in parameters
            for value in parameters.values():
                look(value)

    look(getattr(text, "rope_parameters", None))
    return bool(kinds) and kinds <= _RELATIVE and not absolute
