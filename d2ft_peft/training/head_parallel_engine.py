"""Head-parallel training by the Trainer: it reads, logs, saves and resumes, and `HeadParallel` runs its steps.

To Accelerate this is tensor parallelism: one group of all processes, which get the same batches, and a model that
needs no wrapper.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import DistributedType, recursively_apply, send_to_device
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_pt_utils import safe_globals

from ..head_parallel import HeadParallel
from ..head_parallel.rank_planner import HeadParallelPlanner
from ..planning import D2FTPlanner
from ..processes import world_size
from ..tuners import check_trains
from ..whole_files import replacing
from .generating import generator
from .local_engine import LocalEngine


if TYPE_CHECKING:
    from .session import TrainingSession


_RNG_FILE = "rng_state.pth"


def is_head_parallel(model: nn.Module | None) -> bool:
    """Whether an adapter of the model was made with ``head_parallel=True``."""
    configs = getattr(model, "peft_config", None) or {}
    return any(getattr(config, "head_parallel", False) for config in configs.values())


class _HeadParallelism(ParallelismConfig):
    """All processes get the same batches, on CPUs as well, where Accelerate knows no tensor parallelism."""

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        if accelerator.distributed_type != DistributedType.MULTI_CPU:
            super()._validate_accelerator(accelerator)


class HeadParallelEngine(LocalEngine):
    """Runs all micro-batches of an optimizer step together, when the Trainer comes to the last of them.

    - Norms are taken over all ranks; losses, tokens and predictions are those of one rank, since all have the same.
    - Checkpoints are whole, written by rank 0, and continue on any number of ranks.

    Attributes:
        parallel: What drives the model, from the moment that it is cut.
    """

    def __init__(self, trainer: Trainer):
        super().__init__(trainer)
        self.parallel: HeadParallel | None = None
        self._scored: Any = None

    def accelerator_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """All processes are one group that gets the same batches."""
        if arguments.get("parallelism_config") is None and self.trainer.args.world_size > 1:
            arguments["parallelism_config"] = _HeadParallelism(tp_size=self.trainer.args.world_size)
        return arguments

    @property
    def _same_data(self) -> bool:
        """Whether all processes get the same batches."""
        config = self.trainer.accelerator.parallelism_config
        return config is not None and config.tp_size == self.trainer.args.world_size > 1

    def cut(self, before_cut: Callable[[HeadParallelPlanner], None] | None = None) -> HeadParallel:
        """Let every process keep its own heads only; once, for as long as the model lives."""
        if self.parallel is None:
            self._check()
            trainer = self.trainer
            model = trainer.accelerator.unwrap_model(trainer.model)
            timeout = timedelta(seconds=trainer.args.ddp_timeout)
            self.parallel = HeadParallel(model, trainer.args.gradient_accumulation_steps, timeout, before_cut)
        return self.parallel

    def make_planner(self, session: TrainingSession) -> D2FTPlanner:
        """A planner of the cut model; scores that take a pass are made while it is still whole."""
        check_trains(session.model)
        if self.parallel is None:
            planner = self.cut(session.score_whole_model).planner
            self._scored = self.trainer.train_dataset
            return planner
        scores = self.parallel.planner.scores
        planner = self.parallel.renew_planner(session.accumulation)
        if scores and self._scored is not self.trainer.train_dataset:
            raise ValueError(
                "the data set changed, and samples cannot be scored on a model that is cut over processes; make the "
                "model and the Trainer anew, or choose scores that take no pass (backward_score='weight_magnitude')."
            )
        self._scored = self.trainer.train_dataset
        planner.scores.update(scores)
        return planner

    def _check(self) -> None:
        args = self.trainer.args
        kind = self.trainer.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise ValueError(
                f"head_parallel=True does not run under {kind.value}: both share the weights out, by heads and by "
                "parameters; launch with plain torchrun, or set head_parallel=False."
            )
        if name := generator(self.trainer):
            raise ValueError(
                f"head_parallel=True does not run in {name}, which generates with the whole model; set "
                "head_parallel=False, and every process generates its own."
            )
        if args.world_size == 1:
            raise ValueError(
                "head_parallel=True shares the heads out over several processes, and this is the only one; start with "
                "torchrun or accelerate launch, or set model.peft_config['default'].head_parallel = False."
            )
        if not self._same_data:
            raise ValueError(
                "head_parallel=True needs the same batches on all processes, and this Trainer was made to share them "
                "out; construct D2FTTrainer(model=...) with the adapted model (no D2FTCallback, no model_init)."
            )
        if args.gradient_accumulation_steps == 1 and self.trainer.is_in_train:
            raise ValueError(
                "gradient_accumulation_steps=1 does not go with head_parallel=True, which runs the micro-batches of an "
                "optimizer step together; set it to their number."
            )
        for name, bad, advice in (
            ("fp16", True, "its gradient scaler looks at one rank only; use bf16"),
            ("save_on_each_node", True, "the first process writes whole files; put output_dir where all can read it"),
        ):
            if getattr(args, name) == bad:
                raise ValueError(f"{name}={bad!r} does not go with head_parallel=True: {advice}.")

    def begin(self, session: TrainingSession) -> None:
        """Losses are weighted as elsewhere; one process's worth of them each."""
        super().begin(session)
        self._loss.processes = 1

    def prepare_for_training(self, default: Callable, *args: Any) -> Any:
        """Accelerate wraps a tensor-parallel model in nothing, and asks it for its degree."""
        model = self.trainer.model
        model.tp_size = self.trainer.args.world_size
        try:
            return default(*args)
        finally:
            del model.tp_size

    def count_items(self, session: TrainingSession, default: Callable, batches: list, device: torch.device) -> Any:
        """Every process counts the same items."""
        return default(batches, device)

    def training_step(
        self, session: TrainingSession, default: Callable[..., Tensor], model: nn.Module, inputs: dict, items: Any
    ) -> Tensor:
        """Run all micro-batches of an optimizer step at the last of them; the loss of the others is zero."""
        trainer = self.trainer
        if not session.is_last:
            return torch.zeros((), device=trainer.args.device)
        if not session.step_runs:
            return session.pass_over()
        model.train()
        batches = [send_to_device(task.batch, trainer.args.device) for task in session.step_tasks]
        tasks = {_fingerprint(batch): task for batch, task in zip(batches, session.step_tasks, strict=True)}

        def backward(batch: dict[str, Any], share: float) -> Tensor:
            task = tasks[_fingerprint(batch)]
            planned = session.planner.peek(task.index)
            micro_batch = dataclasses.replace(planned, weight=planned.weight / world_size(), last=False)
            with self._loss.around(micro_batch, task.facts):
                return default(model, batch, items)

        # Ranks draw unequally often (dropout), and must not drift apart in what the data loader draws from.
        devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), trainer.accelerator.autocast():
            torch.manual_seed(hash((trainer.args.seed, trainer.state.global_step, trainer.args.process_index)))
            return self.parallel.forward_backward(batches, session.planner.schedule, backward)

    def flops(self, session: TrainingSession) -> float:
        """FLOPs of a whole step, at its last micro-batch."""
        return session.planner.last_flops() if session.is_last and session.step_runs else 0.0

    def clip(self, session: TrainingSession, default: Callable[..., Any], model: nn.Module) -> Any:
        """Clip by the norm over all ranks."""
        return self._norm(session, self.trainer.args.max_grad_norm)

    def grad_norm(self, session: TrainingSession, default: Callable[..., Any], model: nn.Module, known: Any) -> Any:
        """The norm over all ranks."""
        return default(model, self._norm(session, float("inf")) if known is None else known)

    def _norm(self, session: TrainingSession, max_norm: float) -> Any:
        if session.step_runs:
            session.grad_norm = self.parallel.clip_grad_norm_(max_norm)
        return session.grad_norm

    def tokens(self, before: int, after: int) -> int:
        """All processes saw the same tokens."""
        return before + (after - before) // self.trainer.args.world_size if self._same_data else after

    def evaluation_loop(self, default: Callable, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict, on all ranks with the same batches."""
        if self._same_data:
            self.cut()  # of a model that was loaded in parts there is no other way
            self.trainer.gather_function = self._without_copies
        return default(*args, **kwargs)

    def _without_copies(self, data: Any) -> Any:
        """What evaluation gathers from the processes: this one's, which has all of it."""
        state = self.trainer.accelerator.gradient_state
        if not (state.end_of_dataloader and state.remainder > 0):
            return data
        return recursively_apply(lambda tensor: tensor[: state.remainder], data)

    def save_model(self, default: Callable, output_dir: str | None, state_dict: dict | None) -> None:
        """Save the whole adapter."""
        if self.parallel is None:
            default(output_dir, state_dict)
            return
        default(output_dir, self.parallel.gather_state_dict())
        self.trainer.accelerator.wait_for_everyone()

    def save_optimizer(self, default: Callable, output_dir: str) -> None:
        """Save the whole optimizer state."""
        self.parallel.save_optimizer(self.trainer.optimizer, output_dir)
        if self.trainer.args.should_save:
            with replacing(os.path.join(output_dir, SCHEDULER_NAME)) as temporary:
                torch.save(self.trainer.lr_scheduler.state_dict(), temporary)

    def save_rng_state(self, default: Callable, output_dir: str) -> None:
        """The same on all ranks: one file, as one process writes it."""
        if self.trainer.args.should_save:
            default(output_dir)
            os.replace(os.path.join(output_dir, "rng_state_0.pth"), os.path.join(output_dir, _RNG_FILE))

    def load_rng_state(self, default: Callable, checkpoint: str | None) -> None:
        """Load the state that all ranks share."""
        path = os.path.join(checkpoint or "", _RNG_FILE)
        if not os.path.isfile(path):
            default(checkpoint)
            return
        with safe_globals():
            state = torch.load(path, weights_only=True)
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["cpu"])

    def load_model(self, default: Callable, checkpoint: str, *args: Any) -> None:
        """Load each rank's part of an adapter."""
        self.cut().load_adapter(checkpoint)

    def load_best_model(self, default: Callable) -> None:
        """Load each rank's part of the best checkpoint."""
        self.cut().load_adapter(self.trainer.state.best_model_checkpoint)

    def load_optimizer(self, default: Callable, checkpoint: str | None) -> None:
        """Load each rank's part of an optimizer's state."""
        default(checkpoint)  # takes an optimizer of one process whole
        if checkpoint is not None:
            self.parallel.load_optimizer(self.trainer.optimizer, checkpoint)
            self._load_scheduler(checkpoint)


def _fingerprint(batch: dict[str, Any]) -> int:
    """What tells a micro-batch from the others in whatever dictionary its tensors lie."""
    return id(next(value for value in batch.values() if isinstance(value, Tensor)))
