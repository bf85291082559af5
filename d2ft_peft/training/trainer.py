"""The Trainer: hands the micro-batches of every optimizer step to a `TrainingSession`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from ..head_parallel import HeadParallel
from ..planning import D2FTPlanner
from ..planning.state import load_state, save_state
from .head_parallel_engine import HeadParallelEngine, is_head_parallel
from .head_rate import give_head_its_rate
from .local_engine import LocalEngine
from .report_callback import ReportCallback
from .session import TrainingSession


class D2FTTrainerMixin:
    """What D2FT adds to a `transformers.Trainer`; mix it into any subclass of it, before that class.

    - A `TrainingSession` belongs to one call of ``train()``: it schedules, runs and counts micro-batches.
    - `get_batch_samples`, called once per optimizer step with all its micro-batches, makes the schedule. Without
      gradient accumulation it reads ``num_micro_batches`` steps ahead and schedules them together.
    - `training_step` runs a micro-batch under its row; one that is skipped as a whole is not run. Those come first in
      their step, so that the last one, which synchronizes the gradients, always runs.
    - An engine runs them here, or with ``head_parallel=True`` on the heads that the processes share out.
    - Logs hold what was executed; checkpoints hold all that the next schedule depends on.

    Only what the Trainer has no public hook for is overridden by a private name, and a Trainer that lacks one of these
    names is refused when the class is made.
    """

    _d2ft_session: TrainingSession | None = None
    _d2ft_own_engine: LocalEngine | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        bases = cls.__mro__[cls.__mro__.index(D2FTTrainerMixin) + 1 :]
        if any(issubclass(base, Trainer) for base in bases):
            missing = [name for name in _OVERRIDDEN if not any(name in vars(base) for base in bases)]
            if missing:
                raise TypeError(
                    f"{cls.__name__}: this version of transformers has no Trainer.{', '.join(missing)}, which D2FT "
                    "builds on; install a version within the range that d2ft_peft asks for."
                )

    @property
    def planner(self) -> D2FTPlanner | None:
        """The planner of the current or last session, or None before the first."""
        return self._d2ft_session and self._d2ft_session.planner

    @property
    def head_parallel(self) -> HeadParallel | None:
        """What drives a head-parallel model, from the moment that it is cut."""
        return getattr(self._d2ft_engine, "parallel", None)

    @property
    def _d2ft_engine(self) -> LocalEngine:
        """What runs micro-batches; another one for a model that is driven in another way."""
        kind = HeadParallelEngine if is_head_parallel(self.model) else LocalEngine
        if type(self._d2ft_own_engine) is not kind:
            self._d2ft_own_engine = kind(self)
        return self._d2ft_own_engine

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        return self._d2ft_engine.accelerator_arguments(super()._build_accelerator_args(**kwargs))

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._d2ft_session = None  # the former one's model and data may be gone
        self._d2ft_session = session = TrainingSession(self, self._d2ft_engine, super()._get_dataloader)
        try:
            result = super()._inner_training_loop(*args, **kwargs)
        finally:
            session.close()
        return result._replace(training_loss=result.metrics.get("train_loss", result.training_loss))

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> DataLoader:
        """Training batches carry what planning has to know of them."""
        session = self._d2ft_session
        if session is None or not session.trains or session.rollouts or not kwargs.get("is_training"):
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        return session.data.loader(dataset, description, *args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        return self._d2ft_engine.prepare_for_training(super()._prepare_for_training, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer, in which the head may have a learning rate of its own."""
        was_given = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        give_head_its_rate(optimizer, self.model, was_given, self.args.optim)
        return optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Fetch and schedule the micro-batches of an optimizer step."""
        session = self._d2ft_session
        if session is None or not session.trains:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches, running = session.next_step(epoch_iterator, num_batches)
        items = self._d2ft_engine.count_items(session, self._get_num_items_in_batch, running, device)
        return batches, items if running else None

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Inputs of a model; those that were generated when the step was scheduled are left as they are."""
        session = self._d2ft_session
        if session is not None and session.trains and session.rollouts and isinstance(inputs, Mapping):
            return inputs
        return super()._prepare_inputs(inputs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run one micro-batch under its plan; the loss of one that is not run is zero."""
        session = self._d2ft_session
        if session is None or not session.trains:  # somebody takes a step of his own
            return super().training_step(model, inputs, num_items_in_batch)
        return session.training_step(super().training_step, model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs: dict[str, torch.Tensor | Any]) -> Any:
        """FLOPs of the last micro-batch, as executed."""
        return self._d2ft_session.flops

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(self._d2ft_session.counted_inputs(inputs))
        self.state.num_input_tokens_seen = self._d2ft_engine.tokens(before, self.state.num_input_tokens_seen)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._d2ft_engine.clip(self._d2ft_session, super()._clip_grad_norm, model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return self._d2ft_engine.grad_norm(self._d2ft_session, super()._get_grad_norm, model, grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with what was executed beside the training loss: since the last entry, at the end in the whole run."""
        session = self._d2ft_session
        if session is not None and session.trains:
            session.complete_logs(logs)
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ReportCallback):
                    callback.complete_logs(self, logs)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict; every subnet runs."""
        return self._d2ft_engine.evaluation_loop(super().evaluation_loop, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self._d2ft_engine.save_model(super()._save, output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._d2ft_engine.save_optimizer(super()._save_optimizer_and_scheduler, output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        self._d2ft_engine.save_rng_state(super()._save_rng_state, output_dir)
        session = self._d2ft_session
        session.planner.share()
        state = session.state_dict()
        if self.args.should_save:
            save_state(session.planner, output_dir, session=state)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():  # the Trainer copies the files that it knows
            self.planner.config.save_own_fields(self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        rollouts = self._d2ft_session and self._d2ft_session.rollouts
        if rollouts and not rollouts.takes_random_state():
            return
        self._d2ft_engine.load_rng_state(super()._load_rng_state, checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._d2ft_engine.load_model(super()._load_from_checkpoint, resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._d2ft_engine.load_best_model(super()._load_best_model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            session = self._d2ft_session
            usual = session.planner.num_micro_batches
            session.load_state_dict(load_state(session.planner, checkpoint)["session"], usual)
            if session.rollouts and not self.args.ignore_data_skip:
                session.rollouts.resumed = checkpoint
        self._d2ft_engine.load_optimizer(super()._load_optimizer_and_scheduler, checkpoint)


_OVERRIDDEN = [name for name in vars(D2FTTrainerMixin) if name.startswith("_") and not name.startswith(("__", "_d2ft"))]


class D2FTTrainer(D2FTTrainerMixin, Trainer):
    """A drop-in `transformers.Trainer` for models wrapped with a `D2FTConfig`.

    model = get_peft_model(model, D2FTConfig(compute_budget=0.6, modules_to_save=["classifier"]))
    trainer = D2FTTrainer(model=model, args=TrainingArguments(..., gradient_accumulation_steps=5), ...)
    trainer.train()

    Args:
        *args: As `transformers.Trainer` takes them.
        **kwargs: The same by name.
        report: File of an HTML report that is written when training ends, see `ReportCallback`; None writes none.
    """

    def __init__(self, *args: Any, report: str | os.PathLike | None = None, **kwargs: Any):
        callback = None if report is None else ReportCallback(report)
        super().__init__(*args, **kwargs)
        if callback is not None:
            self.add_callback(callback)
