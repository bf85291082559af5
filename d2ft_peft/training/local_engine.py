"""Micro-batches that run where the Trainer runs them: on one process, under DDP, FSDP2 or DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from ..head_parallel.storage.optimizer_state import OPTIMIZER_FILE, load_optimizer
from ..planning import D2FTPlanner
from ..planning.schedule_maker import active_adapter
from ..processes import MEETING
from ..scores import IGNORED
from ..tuners import check_intercepted, check_trains
from .parallelism import check_parallelism, check_shardable
from .step_loss import StepLoss, computes_stock_loss


if TYPE_CHECKING:
    from .session import TrainingSession


class LocalEngine:
    """How a session's micro-batches run, and how the model is clipped, saved and loaded.

    What stands here is a Trainer on one process, or under DistributedDataParallel, FSDP2 or DeepSpeed, to whose own
    methods (`default`) almost everything is left; `HeadParallelEngine` overrides it.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def accelerator_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the Trainer makes its Accelerator with."""
        return arguments

    def make_planner(self, session: TrainingSession) -> D2FTPlanner:
        """The planner of a session.

        Raises:
            ValueError: If the processes are driven in a way under which D2FT cannot run.
        """
        trainer = self.trainer
        check_trains(session.model)
        check_intercepted(session.model)
        check_parallelism(trainer, session.model)
        progress = not trainer.args.disable_tqdm and trainer.is_world_process_zero()
        usual = session.accumulation
        if usual == 1:
            usual = session.model.peft_config[active_adapter(session.model)].num_micro_batches
        if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
            setattr(session.model, MEETING, True)
        planner = D2FTPlanner(session.model, usual, progress)
        check_shardable(trainer, planner)
        return planner

    def begin(self, session: TrainingSession) -> None:
        """Prepare the Trainer, before it wraps the model.

        Raises:
            ValueError: If DistributedDataParallel is promised a graph that never changes.
        """
        trainer = self.trainer
        handler = trainer.accelerator.ddp_handler
        if handler is not None and handler.static_graph and trainer.args.world_size > 1:
            raise ValueError(
                "ddp_static_graph=True promises DistributedDataParallel the same graph in every step, and each plan of "
                "D2FT makes another; leave it out: every parameter receives a gradient, so nothing is searched for."
            )
        if handler is not None and trainer.args.ddp_find_unused_parameters is None:
            # Every parameter receives a gradient, if only zero: there is nothing to look for.
            handler.find_unused_parameters = False
        if trainer.accelerator.distributed_type == DistributedType.FSDP:
            session.planner.runtime.touch_gradients = False  # it exchanges what gradients there are, on all ranks alike
        if session.planner.shares is not None:
            self._prepare_shares()
        unread = session.planner.unread
        unread.labels = computes_stock_loss(trainer)
        unread.head = unread.labels and not session.planner.source.live
        self._loss = StepLoss(trainer, session.planner, trainer.args.world_size, session.rollouts)

    def _prepare_shares(self) -> None:
        """Let nothing but the gradient exchange make unequal processes wait for each other."""
        trainer = self.trainer
        if not trainer.args.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices=False would weigh the processes alike, which run different numbers of "
                "samples under device_capacities='auto'; leave it out."
            )
        if trainer.args.ddp_broadcast_buffers is None and trainer.accelerator.ddp_handler is not None:
            # Else every step begins with waiting for process 0. No buffer of a transformer changes in training.
            trainer.accelerator.ddp_handler.broadcast_buffers = False

    def count_items(self, session: TrainingSession, default: Callable, batches: list, device: torch.device) -> Any:
        """Items of all processes. Where every sample has one label their number is known without asking around."""
        trainer, shares = self.trainer, session.planner.shares
        if shares is None or trainer.args.world_size == 1:
            return default(batches, device)
        labels = [batch["labels"] for batch in batches if "labels" in batch]
        counts = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
        if counts and labels and all(label.ndim == 1 for label in labels):
            if any(task.facts.items != task.facts.size for task in session.step_tasks if task.runs):
                raise ValueError(
                    f"a sample has the label {IGNORED}, which carries no loss, and device_capacities='auto' counts "
                    "samples; leave such samples out of the data set."
                )
            return torch.tensor(int(shares.counts.sum()), device=device)
        items = default(batches, device)
        if items is not None:
            shares.pace.begin_together()
        return items

    def training_step(
        self, session: TrainingSession, default: Callable[..., Tensor], model: nn.Module, inputs: dict, items: Any
    ) -> Tensor:
        """Run the session's current micro-batch under its row of the schedule."""
        if session.idle:
            return session.pass_over()
        task, planner = session.current, session.planner
        with (
            planner.unread.counting(inputs, task.facts.items, planner.shifts_labels),
            planner.micro_batch(task.index) as micro_batch,
            self._loss.around(micro_batch, task.facts),
        ):
            return default(model, inputs, items)

    @contextmanager
    def accumulating(self, model: nn.Module) -> Iterator[None]:
        """Let a micro-batch add to the gradients of the step, which others of the same step synchronize."""
        accelerator = self.trainer.accelerator
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            with accelerator.no_sync(model):
                yield
            return
        # DeepSpeed steps at the end of a backward pass that synchronizes.
        state, before = accelerator.gradient_state, accelerator.sync_gradients
        state._set_sync_gradients(False)
        try:
            yield
        finally:
            state._set_sync_gradients(before)

    def flops(self, session: TrainingSession) -> float:
        """FLOPs of the current micro-batch in this process, as executed."""
        return 0.0 if session.idle else session.planner.last_flops()

    def clip(self, session: TrainingSession, default: Callable[..., Any], model: nn.Module) -> Any:
        """Clip gradients; a step that does not run has the norm of the last one that did."""
        if session.step_runs:
            session.grad_norm = default(model)
        return session.grad_norm

    def grad_norm(self, session: TrainingSession, default: Callable[..., Any], model: nn.Module, known: Any) -> Any:
        """The norm of the gradients, which is known already where they were clipped."""
        if known is None and session.step_runs:
            session.grad_norm = default(model, None)
        return session.grad_norm if known is None else default(model, known)

    def tokens(self, before: int, after: int) -> int:
        """Tokens seen, from the Trainer's counts before and after a micro-batch."""
        return after

    def evaluation_loop(self, default: Callable, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict."""
        return default(*args, **kwargs)

    def save_model(self, default: Callable, output_dir: str | None, state_dict: dict | None) -> None:
        """Save the adapter."""
        default(output_dir, state_dict)

    def save_optimizer(self, default: Callable, output_dir: str) -> None:
        """Save optimizer and scheduler."""
        default(output_dir)

    def save_rng_state(self, default: Callable, output_dir: str) -> None:
        """Save the random state of this process."""
        default(output_dir)

    def load_rng_state(self, default: Callable, checkpoint: str | None) -> None:
        """Load it."""
        default(checkpoint)

    def load_model(self, default: Callable, checkpoint: str, *args: Any) -> None:
        """Load the adapter of a checkpoint."""
        default(checkpoint, *args)

    def load_best_model(self, default: Callable) -> None:
        """Load the adapter of the best checkpoint."""
        default()

    def load_optimizer(self, default: Callable, checkpoint: str | None) -> None:
        """Load optimizer and scheduler, also those of a head-parallel run."""
        default(checkpoint)
        if checkpoint is not None and os.path.isfile(os.path.join(checkpoint, OPTIMIZER_FILE)):
            load_optimizer(self.trainer.optimizer, self.trainer.model, checkpoint)
            self._load_scheduler(checkpoint)

    def _load_scheduler(self, checkpoint: str) -> None:
        # The Trainer leaves it out where it finds no optimizer of its own.
        path = os.path.join(checkpoint, SCHEDULER_NAME)
        self.trainer.lr_scheduler.load_state_dict(torch.load(path, weights_only=True))

    def prepare_for_training(self, default: Callable, *args: Any) -> Any:
        """Wrap the model, make the optimizer."""
        return default(*args)
