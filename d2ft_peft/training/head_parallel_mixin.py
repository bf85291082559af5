"""Head-parallel training by the Trainer: it reads, logs, saves and resumes, and `HeadParallel` runs its steps.

To Accelerate this is tensor parallelism: one group of all processes, which get the same batches, and a model that
needs no wrapper. What is particular to it stands here; a Trainer on one process or under DDP passes through.
"""

from __future__ import annotations

import dataclasses
import os
import random
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import DistributedType, recursively_apply
from torch import Tensor, nn
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_pt_utils import safe_globals

from ..head_parallel.execution import HeadParallel
from ..head_parallel.rank_planner import HeadParallelPlanner
from ..head_parallel.storage.optimizer_state import OPTIMIZER_FILE, load_optimizer
from ..planning.planner import D2FTPlanner


_RNG_FILE = "rng_state.pth"


def _is_head_parallel(model: nn.Module | None) -> bool:
    configs = getattr(model, "peft_config", None) or {}
    return any(getattr(config, "head_parallel", False) for config in configs.values())


class _HeadParallelism(ParallelismConfig):
    """All processes get the same batches, on CPUs as well, where Accelerate knows no tensor parallelism."""

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        if accelerator.distributed_type != DistributedType.MULTI_CPU:
            super()._validate_accelerator(accelerator)


class HeadParallelMixin:
    """What ``head_parallel=True`` changes in a D2FT Trainer; stands before `ScheduledTrainerMixin`.

    - All micro-batches of an optimizer step run together, when the Trainer comes to the last of them.
    - Norms are taken over all ranks; losses, tokens and predictions are those of one rank, since all have the same.
    - Checkpoints are whole, written by rank 0, and continue on any number of ranks.

    Attributes:
        head_parallel: What drives the model, from the start of training, or None.
    """

    head_parallel: HeadParallel | None = None
    _resumes = False

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        args = super()._build_accelerator_args(**kwargs)
        if _is_head_parallel(self.model) and args.get("parallelism_config") is None and self.args.world_size > 1:
            args["parallelism_config"] = _HeadParallelism(tp_size=self.args.world_size)
        return args

    @property
    def _same_data(self) -> bool:
        """Whether all processes get the same batches."""
        config = self.accelerator.parallelism_config
        return _is_head_parallel(self.model) and config is not None and config.tp_size == self.args.world_size > 1

    def _make_planner(self, model: nn.Module) -> D2FTPlanner:
        if not _is_head_parallel(model):
            return super()._make_planner(model)
        self._check_head_parallel()
        self.head_parallel = HeadParallel(
            model,
            self.args.gradient_accumulation_steps,
            timedelta(seconds=self.args.ddp_timeout),
            before_cut=None if self._resumes else self._score_whole_model,
        )
        return self.head_parallel.planner

    def _check_head_parallel(self) -> None:
        args = self.args
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
        for name, bad, advice in (
            ("fp16", True, "its gradient scaler looks at one rank only; use bf16"),
            ("save_on_each_node", True, "the first process writes whole files; put output_dir where all can read it"),
        ):
            if getattr(args, name) == bad:
                raise ValueError(f"{name}={bad!r} does not go with head_parallel=True: {advice}.")

    def _score_whole_model(self, planner: HeadParallelPlanner) -> None:
        if self.train_dataset is not None:
            self.planner = planner
            self._score_once()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; a resumed run reads its scores of samples from the checkpoint."""
        self._resumes = bool(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _prepare_for_training(self, *args: Any) -> tuple:
        if self.head_parallel is None:
            return super()._prepare_for_training(*args)
        if self.args.gradient_accumulation_steps == 1:
            raise ValueError(
                "gradient_accumulation_steps=1 does not go with head_parallel=True, which runs the micro-batches of an "
                "optimizer step together; set it to their number."
            )
        # Accelerate wraps a tensor-parallel model in nothing, and asks it for its degree.
        self.model.tp_size = self.args.world_size
        try:
            return super()._prepare_for_training(*args)
        finally:
            del self.model.tp_size

    def _schedule(self, candidates: list[dict]) -> tuple[list[dict], list[int | None]]:
        self._candidates = candidates
        return super()._schedule(candidates)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run all micro-batches of an optimizer step at the last of them; the loss of the others is zero."""
        if self.head_parallel is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self._upcoming.pop(0)
        self._idle = bool(self._upcoming) or self.planner.schedule.skipped.all()
        if self._idle:
            return torch.zeros((), device=self.args.device)
        model.train()
        batches = [self._prepare_inputs(batch) for batch in self._candidates]
        if self._divides_by_items is None:
            self._divides_by_items = self._probe_loss(batches[0])

        def backward(batch: dict[str, Any], share: float) -> Tensor:
            self._current = dataclasses.replace(self.planner.peek(0), weight=share)
            return self._plain_step(model, batch, num_items_in_batch)

        # Ranks draw unequally often (dropout), and must not drift apart in what the data loader draws from.
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.accelerator.autocast():
            torch.manual_seed(hash((self.args.seed, self.state.global_step, self.args.process_index)))
            return self.head_parallel.forward_backward(batches, self.planner.schedule, backward)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if self.head_parallel is None:
            return super()._clip_grad_norm(model)
        return self.head_parallel.clip_grad_norm_(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        if grad_norm is None and self.head_parallel is not None:
            grad_norm = self.head_parallel.clip_grad_norm_(float("inf"))
        return super()._get_grad_norm(model, grad_norm)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        if self._same_data:
            seen = self.state.num_input_tokens_seen - before
            self.state.num_input_tokens_seen = before + seen // self.args.world_size

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate or predict, on all ranks with the same batches."""
        if self._same_data:
            self._start()  # of a model that was loaded in parts there is no other way
            self.gather_function = self._without_copies
        return super().evaluation_loop(*args, **kwargs)

    def _without_copies(self, data: Any) -> Any:
        """What stands in for `Accelerator.gather_for_metrics`, which would gather every rank's copy."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return data
        return recursively_apply(lambda tensor: tensor[: state.remainder], data)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.head_parallel is None:
            super()._save(output_dir, state_dict)
            return
        super()._save(output_dir, self.head_parallel.gather_state_dict())
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.head_parallel is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.head_parallel.save_optimizer(self.optimizer, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _save_rng_state(self, output_dir: str) -> None:
        # The same on all ranks: one file, as one process writes it.
        if self.head_parallel is None or self.args.should_save:
            super()._save_rng_state(output_dir)
        if self.head_parallel is not None and self.args.should_save:
            os.replace(os.path.join(output_dir, "rng_state_0.pth"), os.path.join(output_dir, _RNG_FILE))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        path = os.path.join(checkpoint or "", _RNG_FILE)
        if self.head_parallel is None or not os.path.isfile(path):
            super()._load_rng_state(checkpoint)
            return
        with safe_globals():
            state = torch.load(path, weights_only=True)
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["cpu"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.head_parallel is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.head_parallel.load_adapter(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.head_parallel is None:
            super()._load_best_model()
        else:
            self.head_parallel.load_adapter(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # takes an optimizer of one process whole
        if checkpoint is None:
            return
        if self.head_parallel is not None:
            self.head_parallel.load_optimizer(self.optimizer, checkpoint)
        elif os.path.isfile(os.path.join(checkpoint, OPTIMIZER_FILE)):
            load_optimizer(self.optimizer, self.model, checkpoint)
        else:
            return
        # The Trainer leaves it out where it finds no optimizer of its own.
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True))
