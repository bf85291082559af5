"""One call of `Trainer.train()`: what D2FT knows and does of a model, a data set and a set of arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from ..engine import FrozenCache, get_runtime, open_cache
from ..head_start import HeadStart
from ..planning import D2FTPlanner
from ..planning.schedule_maker import active_adapter
from .data import TrainingData
from .generating import check_generation, generator
from .head_pass import start_head
from .local_engine import LocalEngine
from .rollouts import Rollouts
from .step_log import StepLog
from .step_rate import FollowBatch, check_steps_by_groups
from .step_tasks import StepTasks
from .window import StepBatches, Task


class TrainingSession:
    """Schedules the micro-batches of a run, runs them, counts them, and remembers all of it in checkpoints.

    It is made anew by every call of ``train()``, and by every try of ``auto_find_batch_size``: scores, windows and
    costs belong to the model, the data and the arguments that it was made for.

    Args:
        trainer: The Trainer.
        engine: What runs micro-batches: here, or on the heads of several processes.
        make_loader: The Trainer's own way to make a data loader.

    Attributes:
        planner: Makes the schedules.
        data: Makes the data loaders.
        rollouts: Generates what is trained on, where the Trainer does so within its steps; else None.
        current: The micro-batch that the Trainer is at.
        is_last: Whether it is the last of its optimizer step.
        ran: Whether the Trainer ran it, or passed over it.
        flops: FLOPs of what ran when the Trainer came to it, as executed.
        step_tasks: The micro-batches of the current optimizer step, in the order of their schedule.
        step_runs: Whether anything of the current optimizer step runs.
        grad_norm: Of the last optimizer step that ran.
        steps: Counts the optimizer steps, and those that ran.
        head_start: What fitting the head before the first step came to and cost, from the moment before the first
            schedule is made; None if it was not fitted.
        trains: Whether the call of ``train()`` has not ended yet.
    """

    def __init__(self, trainer: Trainer, engine: LocalEngine, make_loader: Callable[..., DataLoader]):
        check_generation(trainer)
        self.trainer, self.engine, self._make_loader = trainer, engine, make_loader
        self.model = trainer.accelerator.unwrap_model(trainer.model)
        self.accumulation = trainer.args.gradient_accumulation_steps
        runtime = get_runtime(self.model)
        self._before = runtime.driven, runtime.touch_gradients, runtime.after_backward
        self.planner: D2FTPlanner = engine.make_planner(self)
        self.data = TrainingData(trainer, self.planner, make_loader)
        self.rollouts = Rollouts(trainer, self.planner) if generator(trainer) else None
        self._tasks = StepTasks(self.planner, self.data, self._before_first_schedule, self.accumulation, self.rollouts)
        self.current: Task | None = None
        self.step_tasks: list[Task] = []
        self.step_runs = False
        self.grad_norm: Tensor | float = 0.0
        self.is_last, self.ran, self.flops = True, False, 0.0
        self._batches = StepBatches(self, [])
        self.steps = StepLog()
        self._rate: FollowBatch | None = None
        self.head_start: HeadStart | None = None
        self._passed = False
        engine.begin(self)
        if rule := self.planner.config.learning_rate_follows_batch:
            check_steps_by_groups("learning_rate_follows_batch", rule, trainer.args.optim)
            self._rate = FollowBatch(self, rule)
            trainer.add_callback(self._rate)
        self._cache = self._open_cache()
        self.planner.runtime.driven = self.trains = True

    def close(self) -> None:
        """Leave the model as it was found, however training ended: any code may use it, or another session goes on."""
        runtime, self.trains = self.planner.runtime, False
        self.planner.unread.close()
        runtime.driven, runtime.touch_gradients, runtime.after_backward = self._before
        if self._rate is not None:
            self.trainer.remove_callback(self._rate)
        if self._cache is not None:
            self._cache.close()

    def _open_cache(self) -> FrozenCache | None:
        """A cache of what frozen blocks return, where the configuration asks for one."""
        config, processes, samples = self.planner.config, self.trainer.args.world_size, self._num_samples()
        if config.cache_frozen is None:
            return None
        here = None if samples is None else -(-samples // processes)
        return open_cache(self.model, config.cache_frozen, config.cache_gigabytes, config.cache_dtype, processes, here)

    def score_whole_model(self, planner: D2FTPlanner) -> None:
        """Score samples before a head-parallel model is cut."""
        if self.trainer.train_dataset is not None:
            TrainingData(self.trainer, planner, self._make_loader).score_once()

    def _before_first_schedule(self, batch: dict[str, Any] | None) -> None:
        """Pass over the training samples, where scores or the head need it; once. A resumed run gives no batch."""
        if not self._passed:
            self._passed = True
            self.head_start = start_head(self.trainer, self.data, batch)
            if self.head_start is not None and self.planner.account is not None:
                steps = self.trainer.state.max_steps - self.trainer.state.global_step
                self.planner.account.prepay(self.head_start.flops / self.trainer.args.world_size, steps)

    def next_step(self, iterator: Iterator, num_batches: int) -> tuple[list[dict], list[dict]]:
        """Fetch and schedule the micro-batches of an optimizer step.

        Args:
            iterator: The pass over the data.
            num_batches: How many the Trainer asks for.

        Returns:
            As many batches as there are, those that do not run first; and the ones that run.
        """
        self._check_unchanged()
        if self.planner.tokens is not None:
            self.planner.tokens.begin_step(self.trainer.state.global_step, self.trainer.state.max_steps)
        self.step_tasks, tasks = self._tasks.next_step(iterator, num_batches)
        self.step_runs = any(task.runs for task in tasks)
        if tasks:
            self.steps.count(self.step_runs)
            if self.planner.counts.each_is_a_step:
                self.planner.counts.end_step()
        self._batches = StepBatches(self, tasks)
        return self._batches, [one.batch for task in tasks for one in (*task.before, task) if one.runs]

    def training_step(
        self, default: Callable[..., Tensor], model: nn.Module, inputs: dict[str, Any], items: Any
    ) -> Tensor:
        """Run the micro-batch that the Trainer has come to; the loss of one that is not run is zero.

        Args:
            default: The Trainer's own step.
            model, inputs, items: Its arguments.
        """
        self._batches.come_to(inputs)
        self.ran, self.flops, last = True, 0.0, self.current
        losses = []
        for self.current in last.before:
            with self.engine.accumulating(model):  # the last one exchanges the gradients of all
                losses.append(self._run(default, model, dict(self.current.batch), items))
        self.current = last
        return sum(losses, self._run(default, model, inputs, items))

    def _run(self, default: Callable[..., Tensor], model: nn.Module, inputs: dict[str, Any], items: Any) -> Tensor:
        loss = self.engine.training_step(self, default, model, inputs, items)
        self.flops += self.engine.flops(self)
        return loss

    def arrive(self, task: Task, is_last: bool) -> None:
        """The Trainer comes to a micro-batch; whether it runs it, or leaves it out, is its own affair."""
        self.current, self.is_last, self.ran, self.flops = task, is_last, False, 0.0

    @property
    def idle(self) -> bool:
        """Whether the current micro-batch is one that does not run, or was left out by the Trainer."""
        return self.current is None or not self.current.runs or not self.ran

    def counted_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs of all that ran when the Trainer came to a micro-batch, for it to count their tokens: in one piece,
        also where nothing ran, since processes gather their counts."""
        if not self.idle and not self.current.before:
            return inputs
        parts = [] if self.idle else [*(task.batch for task in self.current.before), inputs]
        return {
            name: torch.cat([value.flatten()[:0], *(part[name].flatten() for part in parts)])
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }

    def pass_over(self) -> Tensor:
        """What stands for the micro-batch that does not run; if nothing of a step runs, the optimizer does not step."""
        trainer = self.trainer
        if self.current.index is not None:
            self.planner.pass_by(self.current.index)
        if not self.step_runs:
            trainer.accelerator.gradient_state._set_sync_gradients(False)
            if callable(getattr(trainer.optimizer, "train", None)):
                trainer.optimizer.train()  # optimizers that have a mode of their own, and were evaluated in the other
        return torch.zeros((), device=trainer.args.device)

    def complete_logs(self, logs: dict[str, float]) -> None:
        """Put what was executed beside a training loss: since the last entry, or at the end in the whole run."""
        self.steps.correct(logs)
        if "learning_rate" in logs or "train_runtime" in logs:
            logs |= self.planner.pop_logs()
        if "train_runtime" in logs:
            logs |= self.planner.counts.of_run.logs()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the planner's own state; JSON-friendly. Every process calls it."""
        return {
            "rest_of_window": self._tasks.state(),
            "accumulation": self.accumulation,
            "samples": self._num_samples(),
        }

    def load_state_dict(self, state: dict[str, Any], usual: int) -> None:
        """Go on where a checkpoint was made.

        Args:
            state: What `state_dict` returned.
            usual: Micro-batches of a usual step as the arguments are now.

        Raises:
            ValueError: If it has scores of samples, and the data set has another number of them.
        """
        if self.planner.source.by_sample and state["samples"] != self._num_samples():
            raise ValueError(
                f"the checkpoint was made on a data set of {state['samples']} samples, which its scores "
                f"name by number, and this one has {self._num_samples()}; resume on the same one, or start anew from "
                "the adapter."
            )
        self.planner.num_micro_batches = usual
        # Another number of accumulation steps makes other steps: what was left of a window is none of them.
        self._tasks.resume(state["rest_of_window"] if state["accumulation"] == self.accumulation else None)

    def _num_samples(self) -> int | None:
        data = self.trainer.train_dataset
        return len(data) if hasattr(data, "__len__") else None

    def _check_unchanged(self) -> None:
        """A session serves what it was made for, and refuses what it would only follow half."""
        args, model = self.trainer.args, self.trainer.accelerator.unwrap_model(self.trainer.model)
        for name, before, now in (
            ("gradient_accumulation_steps", self.accumulation, args.gradient_accumulation_steps),
            ("the model", id(self.model), id(model)),
            ("the active adapter", self.planner.adapter, active_adapter(self.model)),
        ):
            if before != now:
                raise ValueError(
                    f"{name} changed in the middle of training, from {before!r} to {now!r}; D2FT makes its schedules "
                    "for the former. Change it between two calls of train()."
                )
