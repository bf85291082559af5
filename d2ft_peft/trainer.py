"""The Trainer: schedules the micro-batches of every optimizer step and runs each under its plan."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpoint import load_state, operations_from, save_state
from .planner import D2FTPlanner
from .schedule import Schedule
from .scores import INDEX_KEY, IndexedCollator, IndexedDataset, preserved_rng, score_samples
from .tuners.flops import inference


class D2FTTrainerMixin:
    """What D2FT adds to a `transformers.Trainer`; mix it into any subclass of it, before that class.

    - `get_batch_samples`, called once per optimizer step with all its micro-batches, makes the schedule. Without
      gradient accumulation it reads ``num_micro_batches`` steps ahead and schedules them together.
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
            self.planner = D2FTPlanner(
                model,
                num_micro_batches=steps if steps > 1 else None,
                progress=not self.args.disable_tqdm and self.is_world_process_zero(),
            )
            self.planner.each_is_a_step = steps == 1
            self.planner.runtime.touch_gradients = self.args.world_size > 1
            if self.args.ddp_find_unused_parameters is None:
                # Every parameter receives a gradient, if only zero: there is nothing to look for.
                self.accelerator.ddp_handler.find_unused_parameters = False
            self._window: list[tuple[dict, int]] = []
            self._upcoming: list[int] = []
            self._divides_by_items: bool | None = None
        return self.planner

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
        planner = self._start()
        if self.args.gradient_accumulation_steps > 1:
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            if not batches:
                return batches, None
            self._score_once()
            skipped = planner.plan(batches).skipped
            order = [*np.flatnonzero(skipped), *np.flatnonzero(~skipped)]
            self._upcoming = [int(i) for i in order]
            running = [batches[i] for i in np.flatnonzero(~skipped)]
            return [batches[i] for i in order], self._get_num_items_in_batch(running, device)
        if not self._window:
            self._fill_window(epoch_iterator)
        if not self._window:
            return [], None
        batch, index = self._window.pop(0)
        self._upcoming = [index]
        return [batch], self._get_num_items_in_batch([batch], device)

    def _fill_window(self, epoch_iterator: Iterator) -> None:
        """Read steps ahead and schedule them together; a resumed run first finishes the window that it was in."""
        rest = self.__dict__.pop("_rest_of_window", None)
        size = self.planner.config.num_micro_batches if rest is None else len(rest["operations"])
        with contextlib.suppress(StopIteration):
            for _ in range(size):
                self._window.append((next(epoch_iterator), len(self._window)))
        if not self._window:
            return
        self._score_once()
        planned = self.planner.plan([batch for batch, _ in self._window])
        if rest is not None:
            self.planner.rng.bit_generator.state = rest["rng"]
            rows = operations_from(rest["operations"])[: planned.num_micro_batches]
            self.planner.use(Schedule(rows, planned.weights, planned.devices, planned.costs, None, planned.blocks))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run one micro-batch under its plan; the loss of one that is not run is zero."""
        inputs.pop(INDEX_KEY, None)
        with self.planner.micro_batch(self._upcoming.pop(0)) as micro_batch:
            self._current = micro_batch
            if micro_batch.skipped:
                return torch.zeros((), device=self.args.device)
            if self._divides_by_items is None:
                self._divides_by_items = self._probe_loss(self._prepare_inputs(inputs))
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss, weighted by the samples that ran where it is not yet normalized by items."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        if not model.training or self._loss_is_normalized(num_items_in_batch):
            return result
        if self.args.gradient_accumulation_steps == 1:
            return result
        # The Trainer divides by the number of micro-batches next.
        factor = self._current.weight * self.current_gradient_accumulation_steps
        if factor == 1.0:
            return result
        return (result[0] * factor, result[1]) if return_outputs else result * factor

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
        return self.planner.last_flops()

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> DataLoader:
        """Training batches carry their samples' indices where the policy looks at scores of samples."""
        if not kwargs.get("is_training") or not self._start().needed_scores:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"scores {self.planner.needed_scores} are looked up by sample, which a data set without length and "
                "indices does not allow; choose backward_score='weight_magnitude', or a map-style data set."
            )
        sampler_fn = kwargs.get("sampler_fn")
        if sampler_fn is not None:
            kwargs["sampler_fn"] = lambda _: sampler_fn(dataset)
        return self._indexed_dataloader(dataset, None, description, *args, **kwargs)

    def _indexed_dataloader(
        self, dataset: Any, indices: Any, description: str, *args: Any, **kwargs: Any
    ) -> DataLoader:
        collator = self.data_collator
        if isinstance(dataset, Dataset):
            dataset, inner = self._remove_unused_columns(dataset, description=description), collator
        else:
            inner = self._get_collator_with_removed_columns(collator, description=description)
        self.data_collator = IndexedCollator(inner)
        try:
            return super()._get_dataloader(IndexedDataset(dataset, indices), description, *args, **kwargs)
        finally:
            self.data_collator = collator

    def _score_once(self) -> None:
        """Score the training samples before the first step, as the paper does (or a fraction of them)."""
        planner = self.planner
        for score in planner.needed_scores:
            if score in planner.scores:
                continue
            rows = len(self.train_dataset)
            count = max(1, round(rows * planner.config.score_fraction))
            chosen = np.sort(np.random.default_rng(planner.config.seed).permutation(rows)[:count])
            with preserved_rng():
                loader = self._indexed_dataloader(
                    self.train_dataset, chosen, "Scoring", batch_size=self.args.per_device_train_batch_size
                )
                table = score_samples(planner.model, planner.partition, loader, score, planner.progress)
            planner.scores[score] = self._gather_scores(table)

    def _gather_scores(self, table: Any) -> Any:
        if self.args.world_size == 1:
            return table
        parts: list = [None] * self.args.world_size
        torch.distributed.all_gather_object(parts, table)
        samples, first = np.unique(np.concatenate([part.samples for part in parts]), return_index=True)
        values = np.concatenate([part.values for part in parts])[first]
        return type(table)(table.score, samples, values)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.planner is not None and self.args.should_save:
            rest = None
            if self.args.gradient_accumulation_steps == 1 and self._window:
                rows = [list(self.planner.peek(index).plan.operations) for _, index in self._window]
                rest = {"operations": rows, "rng": self.planner.rng.bit_generator.state}
            save_state(self.planner, output_dir, rest_of_window=rest)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = load_state(self._start(), checkpoint)
            self._window = []
            if state["rest_of_window"] is not None:
                self._rest_of_window = state["rest_of_window"]


class D2FTTrainer(D2FTTrainerMixin, Trainer):
    """A drop-in `transformers.Trainer` for models wrapped with a `D2FTConfig`.

    model = get_peft_model(model, D2FTConfig(compute_budget=0.6, modules_to_save=["classifier"]))
    trainer = D2FTTrainer(model=model, args=TrainingArguments(..., gradient_accumulation_steps=5), ...)
    trainer.train()
    """


class D2FTCallback(TrainerCallback):
    """Gives a plain Trainer, or a subclass that one did not write, what `D2FTTrainer` does.

        Trainer(model=model, callbacks=[D2FTCallback()], ...)

    Callbacks see neither the batches nor the loss, so this one gives the Trainer itself the methods of
    `D2FTTrainerMixin` as soon as it is constructed.

    Args:
        trainer: The Trainer, where it is at hand; else the one that the callback was given to.
    """

    def __init__(self, trainer: Trainer | None = None):
        self._adopted = False
        if trainer is not None:
            self._adopt(trainer)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adopt the Trainer that is being constructed."""
        if not self._adopted:
            self._adopt(_calling_trainer(self))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Speak if the callback came too late."""
        if not self._adopted:
            raise ValueError(
                "D2FTCallback was added to a Trainer that already exists; give it to the constructor, "
                "Trainer(..., callbacks=[D2FTCallback()]), or use trainer.add_callback(D2FTCallback(trainer))."
            )

    def _adopt(self, trainer: Trainer) -> None:
        if not isinstance(trainer, D2FTTrainerMixin):
            cls = type(trainer)
            trainer.__class__ = type(f"D2FT{cls.__name__}", (D2FTTrainerMixin, cls), {})
        self._adopted = True


def _calling_trainer(callback: TrainerCallback) -> Trainer:
    """The Trainer whose constructor is calling, found on the stack: events do not name it."""
    frame: Any = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    raise RuntimeError("D2FTCallback found no Trainer that calls it; use D2FTCallback(trainer).")
