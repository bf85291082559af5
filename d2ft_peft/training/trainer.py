"""The Trainer: schedules the micro-batches of every optimizer step and runs each under its plan."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, gather_object
from torch import nn
from transformers import Trainer

from ..costs.probe import inference
from ..planning.micro_batch import batch_size
from ..planning.planner import D2FTPlanner
from ..planning.state import load_state, operations_from, save_state
from ..scores import CANDIDATES_KEY, INDEX_KEY
from .data import IndexedDataMixin
from .head_parallel_mixin import HeadParallelMixin
from .unequal_shares import SharesMixin


class ScheduledTrainerMixin(SharesMixin, IndexedDataMixin):
    """Schedules the micro-batches of a `transformers.Trainer`.

    - `get_batch_samples`, called once per optimizer step with all its micro-batches, makes the schedule. Without
      gradient accumulation it reads ``num_micro_batches`` steps ahead and schedules them together.
    - Where the policy schedules samples, the data loader only names candidates (data loader workers load them as well):
      those that are to run are loaded and collated into micro-batches afterwards.
    - `training_step` runs a micro-batch under its row; one that is skipped as a whole is not run. Those come first in
      their step, so that the last one, which synchronizes the gradients, always runs.
    - The loss is the mean over the samples (tokens) that ran.
    - Logs hold what was executed; checkpoints hold scores, random state and the rest of a window.

    Attributes:
        planner: The `D2FTPlanner`, from the start of training.
    """

    planner: D2FTPlanner | None = None

    def _start(self) -> D2FTPlanner:
        """Attach to the model at the first step."""
        if self.planner is None:
            model = self.accelerator.unwrap_model(self.model)
            if self.args.n_gpu > 1:
                raise ValueError("D2FT does not run under torch.nn.DataParallel; launch one process per GPU.")
            if self.accelerator.distributed_type not in (
                DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU,
            ):  # fmt: skip
                raise ValueError(
                    f"D2FT does not run under {self.accelerator.distributed_type.value}; use DistributedDataParallel."
                )
            steps = self.args.gradient_accumulation_steps
            self.planner = self._make_planner(model)
            self.planner.each_is_a_step = steps == 1
            self.planner.runtime.touch_gradients = self.args.world_size > 1
            if self.args.ddp_find_unused_parameters is None:
                # Every parameter receives a gradient, if only zero: there is nothing to look for.
                self.accelerator.ddp_handler.find_unused_parameters = False
            if self.planner.shares is not None:
                self._prepare_shares()
            self._window: list[tuple[dict, int | None]] = []
            self._upcoming: list[int | None] = []
            self._idle = False
            self._last_loss: torch.Tensor | None = None
            self._divides_by_items: bool | None = None
        return self.planner

    def _make_planner(self, model: nn.Module) -> D2FTPlanner:
        steps = self.args.gradient_accumulation_steps
        progress = not self.args.disable_tqdm and self.is_world_process_zero()
        return D2FTPlanner(model, steps if steps > 1 else None, progress)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; a training forward outside of the schedule is an error meanwhile."""
        self._start().runtime.driven = True
        try:
            return super().train(*args, **kwargs)
        finally:
            self.planner.runtime.driven = False

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Fetch and schedule the micro-batches of an optimizer step."""
        self._start()
        if self.args.gradient_accumulation_steps > 1:
            candidates, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            if not candidates:
                return candidates, None
            batches, self._upcoming = self._schedule(candidates)
            running = [batch for batch, index in zip(batches, self._upcoming, strict=True) if index is not None]
            return batches, self._get_num_items_in_batch(running, device)
        if not self._window:
            self._fill_window(epoch_iterator)
        if not self._window:
            return [], None
        batch, index = self._window.pop(0)
        self._upcoming = [index]
        return [batch], self._get_num_items_in_batch([batch], device)

    def _schedule(self, candidates: list[dict]) -> tuple[list[dict], list[int | None]]:
        """Schedule batches: as many again, those that do not run first, and the planner's index of each that does."""
        self._score_once()
        if self.planner.schedules_samples:
            batches = self._compose(candidates)
            order: list[int] = list(range(len(batches)))
        else:
            samples = [{key: batch[key] for key in batch if key == INDEX_KEY} for batch in candidates]
            self.planner.plan(candidates)  # takes the indices out, and scores that follow training need them again
            order = self.planner.pass_over()
            batches = [{**candidates[index], **samples[index]} for index in order]
        # The Trainer counts micro-batches. Any batch may stand for one that does not run: it is not looked at.
        idle = len(candidates) - len(order)
        stand_in = (batches or candidates)[0]
        return [*(dict(stand_in) for _ in range(idle)), *batches], [*[None] * idle, *order]

    def _compose(self, candidates: list[dict]) -> list[dict]:
        """Micro-batches of the samples that are to run."""
        indices = torch.cat([batch[INDEX_KEY] for batch in candidates]).cpu().numpy()
        items = [item for batch in candidates for item in batch[CANDIDATES_KEY].items]
        if self.planner.cost_model is None:
            usual = len(candidates[0][INDEX_KEY])
            self.planner.prepare(self._prepare_inputs(self._collate(indices[:usual], items[:usual])))
        groups = self.planner.compose(indices, max(len(batch[INDEX_KEY]) for batch in candidates))
        if len(groups) > len(candidates):
            raise ValueError(
                f"policy={self.planner.config.policy!r} with rows='samples' composed {len(groups)} micro-batches of "
                f"{len(candidates)}; set rows='micro_batches', or choose a policy that runs samples as a whole."
            )
        return [self._collate(indices[group], [items[position] for position in group]) for group in groups]

    def _fill_window(self, epoch_iterator: Iterator) -> None:
        """Read steps ahead and schedule them together; a resumed run first finishes the window that it was in."""
        rest = self.__dict__.pop("_rest_of_window", None)
        size = self.planner.config.num_micro_batches if rest is None else len(rest["operations"])
        if self.planner.shares is not None:
            size = 1  # every process runs some of its samples in every step
        candidates = list(itertools.islice(epoch_iterator, size))
        if candidates:
            batches, order = self._schedule(candidates) if rest is None else self._resume_window(rest, candidates)
            self._window = list(zip(batches, order, strict=True))

    def _resume_window(self, rest: dict, batches: list[dict]) -> tuple[list[dict], list[int | None]]:
        """Finish the window that a checkpoint was made in: the same samples in the same order."""
        if rest["samples"] is not None:
            if len(rest["samples"]) != self.args.world_size:
                raise ValueError(
                    f"this checkpoint was made by {len(rest['samples'])} processes within a window of samples that "
                    f"each had chosen among its own; resume on as many, not on {self.args.world_size}."
                )
            own = rest["samples"][self.args.process_index]
            batches = [self._collate(np.array(samples), [None]) for samples in own]
        rows = operations_from(rest["operations"])
        self.planner.prepare(self._prepare_inputs(dict(batches[-1])))
        self.planner.resume(rows, np.array([batch_size(batch) for batch in batches]))
        self.planner.rng.bit_generator.state = rest["rng"]
        running = self.planner.pass_over()
        return batches, [index if index in running else None for index in range(len(batches))]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run one micro-batch under its plan; the loss of one that is not run is zero."""
        index = self._upcoming.pop(0)
        self._idle = index is None
        if index is None:
            # A step of its own does not count as one without loss in the mean that is logged.
            alone = self.args.gradient_accumulation_steps == 1 and self._last_loss is not None
            return self._last_loss.clone() if alone else torch.zeros((), device=self.args.device)
        self._current_samples = inputs.pop(INDEX_KEY, None)
        with self.planner.micro_batch(index) as micro_batch:
            self._current = micro_batch
            if self._divides_by_items is None:
                self._divides_by_items = self._probe_loss(self._prepare_inputs(inputs))
            self._last_loss = self._plain_step(model, inputs, num_items_in_batch)
            return self._last_loss

    def _plain_step(self, *args: Any) -> torch.Tensor:
        """Forward and backward as the Trainer does them."""
        return super().training_step(*args)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss, weighted by the samples that ran where it is not yet normalized by items."""
        observed = model.training and self.planner is not None and self.planner.source.live
        labels = inputs.get("labels")  # which a label smoother takes out
        result = super().compute_loss(
            model, inputs, return_outputs or bool(observed), num_items_in_batch=num_items_in_batch
        )
        if observed:
            self._observe(result[1], labels)
            result = result if return_outputs else result[0]
        if not model.training or self._loss_is_normalized(num_items_in_batch):
            return result
        if self.args.gradient_accumulation_steps == 1 and self.planner.shares is None:
            return result
        # The Trainer divides by the number of micro-batches next.
        factor = self._current.weight * self.current_gradient_accumulation_steps
        if factor == 1.0:
            return result
        return (result[0] * factor, result[1]) if return_outputs else result * factor

    def _observe(self, outputs: Any, labels: torch.Tensor | None) -> None:
        """Let scores that follow training see a forward pass."""
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if logits is None or labels is None or self._current_samples is None:
            raise ValueError(
                f"score {list(self.planner.source.live)} is read from logits and labels, and this model or its data "
                "set gives none; choose policy='fewer_samples', or 'bilevel' with backward_score='weight_magnitude'."
            )
        self.planner.observe(self._current_samples.cpu().numpy(), logits, labels)

    def _loss_is_normalized(self, num_items_in_batch: Any) -> bool:
        """Whether the loss is already a sum over this micro-batch's items divided by those of the whole step."""
        if num_items_in_batch is None:
            return False
        return self.compute_loss_func is not None or self._divides_by_items

    @torch.no_grad()
    def _probe_loss(self, inputs: dict[str, Any]) -> bool:
        """Whether the model divides its loss by ``num_items_in_batch``. The Trainer takes every model that accepts
        keyword arguments for one that does, but some ignore them (BERT's classifier)."""
        if not self.model_accepts_loss_kwargs or "labels" not in inputs:
            return False
        with inference(self.planner.model):
            losses = [self.planner.model(**inputs, num_items_in_batch=items)["loss"] for items in (1, 2)]
        return bool(losses[0] != losses[1])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with what was executed beside the training loss."""
        if self.planner is not None and ("loss" in logs or "train_runtime" in logs):
            logs |= self.planner.pop_logs()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """FLOPs of the last micro-batch, as executed."""
        return 0.0 if self._idle else self.planner.last_flops()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.planner is None:
            return
        self.planner.share()
        rest = self._unfinished_window() if self.args.gradient_accumulation_steps == 1 and self._window else None
        if self.args.should_save:
            save_state(self.planner, output_dir, rest_of_window=rest)

    def _unfinished_window(self) -> dict[str, Any]:
        planner, nothing = self.planner, [0] * self.planner.partition.num_scheduled
        rows = [nothing if i is None else list(planner.peek(i).plan.operations) for _, i in self._window]
        samples = None
        if planner.schedules_samples:  # every process has chosen its own
            samples = gather_object([[batch[INDEX_KEY].tolist() for batch, _ in self._window]])
        return {"operations": rows, "samples": samples, "rng": planner.rng.bit_generator.state}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = load_state(self._start(), checkpoint)
            self._window = []
            if state["rest_of_window"] is not None:
                self._rest_of_window = state["rest_of_window"]


class D2FTTrainerMixin(HeadParallelMixin, ScheduledTrainerMixin):
    """What D2FT adds to a `transformers.Trainer`; mix it into any subclass of it, before that class.

    It schedules micro-batches (`ScheduledTrainerMixin`) and, with ``head_parallel=True``, shares the heads out over the
    processes (`HeadParallelMixin`).
    """


class D2FTTrainer(D2FTTrainerMixin, Trainer):
    """A drop-in `transformers.Trainer` for models wrapped with a `D2FTConfig`.

    model = get_peft_model(model, D2FTConfig(compute_budget=0.6, modules_to_save=["classifier"]))
    trainer = D2FTTrainer(model=model, args=TrainingArguments(..., gradient_accumulation_steps=5), ...)
    trainer.train()
    """
