"""Short runs of plain training, of fewer samples and of D2FT on one task, taking turns; what they took and reached."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..partition import partition_model
from ..training import D2FTTrainer
from .architecture_choice import has_new_head
from .foreseen import head_names, make_config
from .taking_turns import Turns
from .task_data import Task


PLAIN, FEWER, D2FT = "plain", "fewer samples", "D2FT"
WAYS = (PLAIN, FEWER, D2FT)


@dataclass(frozen=True)
class Setting:
    """How the runs are made.

    Attributes:
        steps: Optimizer steps of the plain run, and of D2FT.
        chunk: Steps after which another run goes on.
        micro_batches, batch_size: Of a step.
        learning_rate: Of all runs.
        r: Rank of LoRA, or None.
        budget: Share of the compute.
        policy: D2FT's, or None for its own.
    """

    steps: int = 30
    chunk: int = 3
    micro_batches: int = 5
    batch_size: int = 8
    learning_rate: float = 5e-5
    r: int | None = None
    budget: float = 0.6
    policy: str | None = None

    def steps_of(self, way: str) -> int:
        """Optimizer steps of a run: fewer samples are fewer steps of all their samples."""
        return max(1, round(self.steps * self.budget)) if way == FEWER else self.steps


@dataclass
class Measured:
    """One run.

    Attributes:
        chunks: Seconds of a step, by chunk; the first one is left out, which holds what is done once.
        prepared: Seconds before the first step: adapting the model, passes over the data.
        loss, metrics: On the held-out samples, at the end.
        memory: Bytes at the peak of a step, weights and optimizer included; None where nobody counts them.
        logged: What D2FT logged last.
    """

    chunks: list[float] = field(default_factory=list)
    prepared: float = 0.0
    loss: float = float("nan")
    metrics: dict[str, float] = field(default_factory=dict)
    memory: int | None = None
    logged: dict[str, float] = field(default_factory=dict)


def usual_rate(r: int | None) -> float:
    """Learning rate where none is given: of full fine-tuning, or of LoRA."""
    return 5e-5 if r is None else 3e-4


def last_logged(trainer: Trainer, *names: str) -> dict[str, float]:
    """The last values of some names in the log, as far as they are there."""
    last = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    return {name: last[name] for name in names if name in last}


def adapt(task: Task, way: str, setting: Setting, seed: int) -> nn.Module:
    """The model with its trainable parameters: the same ones in every run."""
    model = task.build()
    if way == D2FT:
        options = {"policy": setting.policy, "seed": seed}
        return get_peft_model(model, make_config(model, task.name, setting.r, setting.budget, **options))
    if setting.r is None:
        return model
    saved = head_names(model) if has_new_head(task.name) else None
    targets = list(partition_model(model).projections)
    return get_peft_model(model, LoraConfig(r=setting.r, target_modules=targets, modules_to_save=saved))


class ChunkCallback(TrainerCallback):
    """Measures chunks of steps, and lets other runs go on in between.

    Args:
        measured: Gets the seconds and bytes.
        chunk: Steps of a chunk.
        pause: Lets others go on.
        model: Whose memory is counted, in the second step.
    """

    def __init__(self, measured: Measured, chunk: int, pause: Callable[[], None], model: nn.Module):
        self.measured, self.chunk, self.pause, self.model = measured, chunk, pause, model
        self._profiler: Any = None
        self._began = self._start = time.perf_counter()
        self._before = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """The first step ends the preparation; memory is looked at in the second, when the optimizer has its state."""
        if state.global_step == 0:
            self.measured.prepared += time.perf_counter() - self._start
        if state.global_step == min(1, args.max_steps - 1):
            self._look(True)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Read the clock at the end of a chunk."""
        if self._profiler is not None or self._before:
            self.measured.memory = self._look(False) + held_bytes(self.model, optimizer)
        if state.global_step % self.chunk == 0:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if state.global_step > self.chunk:
                self.measured.chunks.append((time.perf_counter() - self._began) / self.chunk)
            self.pause()
            self._began = time.perf_counter()

    def _look(self, begins: bool) -> int:
        """Begin to count what a step allocates, or end: bytes at its peak."""
        if torch.cuda.is_available():
            if begins:
                torch.cuda.reset_peak_memory_stats()
                self._before = torch.cuda.memory_allocated()
                return 0
            before, self._before = self._before, 0
            return torch.cuda.max_memory_allocated() - before
        if begins:
            self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profiler.__enter__()
            return 0
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return int(max(np.cumsum(changes), default=0))


def held_bytes(model: nn.Module, optimizer: Any) -> int:
    """Bytes of weights and of the optimizer's state."""
    states = [value for state in getattr(optimizer, "state", {}).values() for value in state.values()]
    return sum(p.nbytes for p in model.parameters()) + sum(v.nbytes for v in states if torch.is_tensor(v))


def run(task: Task, way: str, setting: Setting, seed: int, pause: Callable[[], None]) -> Measured:
    """One run, from the pre-trained model to its loss on the held-out samples.

    Raises:
        ValueError: If the loss is no number.
    """
    measured, began = Measured(), time.perf_counter()
    tf.set_seed(seed)
    model = adapt(task, way, setting, seed)
    measured.prepared = time.perf_counter() - began
    steps = setting.steps_of(way)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=setting.batch_size,
            per_device_eval_batch_size=2 * setting.batch_size, gradient_accumulation_steps=setting.micro_batches,
            learning_rate=setting.learning_rate, lr_scheduler_type="linear", warmup_steps=steps // 10, seed=seed,
            logging_steps=steps, save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            prediction_loss_only=task.name == "causal-lm",
        )  # fmt: skip
        trainer = (D2FTTrainer if way == D2FT else Trainer)(
            model=model, args=arguments, train_dataset=task.train, eval_dataset=task.held_out,
            data_collator=task.collate, callbacks=[ChunkCallback(measured, setting.chunk, pause, model)],
            compute_metrics=None if task.name == "causal-lm" else accuracy,
        )  # fmt: skip
        trainer.remove_callback(tf.PrinterCallback)
        trainer.train()
        found = trainer.evaluate()
    measured.loss = found["eval_loss"]
    if not np.isfinite(measured.loss):
        raise ValueError(
            f"the loss of the run {way!r} is {measured.loss}; lower learning_rate={setting.learning_rate:g}."
        )
    measured.metrics = {name: found[f"eval_{name}"] for name in ("accuracy",) if f"eval_{name}" in found}
    measured.logged = last_logged(trainer, "flops_ratio", "compute_ratio", "padding_ratio")
    return measured


def accuracy(prediction: tf.EvalPrediction) -> dict[str, float]:
    """Share of samples whose largest logit is their label's."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float(np.mean(logits.argmax(-1) == prediction.label_ids))}


def side_by_side(task: Task, setting: Setting, seeds: int) -> dict[str, list[Measured]]:
    """Runs of every way, a list over the seeds each. Within a seed they take turns, and the first one changes.

    Args:
        task: What is trained.
        setting: How.
        seeds: How often.
    """
    found: dict[str, list[Measured]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        order = [*WAYS[seed % len(WAYS) :], *WAYS[: seed % len(WAYS)]]
        runs = [lambda pause, way=way, seed=seed: run(task, way, setting, seed, pause) for way in order]
        for way, measured in zip(order, Turns().run(runs), strict=True):
            found[way].append(measured)
    return found
