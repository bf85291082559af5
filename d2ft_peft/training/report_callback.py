"""Writes a run's report: keeps what the log does not hold, and adds to the log what the report shows."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..partition import base_model
from ..report.run_record import RUN_FILE, RunRecord, read_run
from ..whole_files import replacing
from .calling import calling_trainer


class ReportCallback(TrainerCallback):
    """Writes one self-contained HTML file at the end of a run, and ``d2ft_run.json`` into its output folder.

        D2FTTrainer(..., report="report.html")          # or
        Trainer(..., callbacks=[D2FTCallback(), ReportCallback("report.html")])

    Under a D2FT trainer every number of the report is logged as well, so that TensorBoard and others get it:
    ``step_seconds`` (mean over optimizer steps, loading included, evaluation and saving left out),
    ``preparation_seconds`` (passes before the first step), ``peak_memory_mib`` (allocated on the
    GPU; on a CPU the whole process) and, with heads on several processes, ``sent_mib_per_step``. Of several processes
    the first one writes. With a stock Trainer it reports what that logs.

    Args:
        path: The HTML file; None writes the record alone, which ``d2ft report`` makes a report of.
        against: Folder of a plain run to draw beside it, or None.

    Raises:
        ImportError: If plotly is not installed, before the run.
        ValueError: If `against` holds no run.
    """

    def __init__(self, path: str | os.PathLike | None = None, against: str | os.PathLike | None = None):
        if path is not None:
            from ..report import write_page  # noqa: F401 - whoever lacks plotly is told before hours of training
        self.path = None if path is None else Path(path)
        self.against = None if against is None else read_run(against)
        self.record = RunRecord()
        self._seconds: list[float] = []
        self._mark: float | None = None
        self._prepared: float | None = None
        self._first = 1
        self._seen: Any = None
        self._sent = (0, 0)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Begin a record, or go on with the one that a resumed run has left."""
        self.record, self._seen, self._seconds = RunRecord(), None, []
        self._began, self._mark, self._prepared = time.perf_counter(), None, None
        run_file = Path(args.output_dir, RUN_FILE)
        if state.global_step and run_file.is_file():
            with contextlib.suppress(ValueError):
                self.record = read_run(run_file)
                self.record.activity.cut(state.global_step)
        self.record.title = args.run_name or Path(args.output_dir).name or "run"
        self._first = state.global_step + 1
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Start the clock at the first step: passes over the data that come before it are counted apart."""
        if self._mark is None:
            self._mark = time.perf_counter()
            self._prepared = self._mark - self._began

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Read it, and note what the step ran."""
        self._seconds.append(time.perf_counter() - self._mark)
        self._mark += self._seconds[-1]
        planner = getattr(calling_trainer(self), "planner", None)
        last = None if planner is None else planner.counts.last
        if last is not None and last is not self._seen:
            self._seen = last
            self.record.activity.add(self._first, state.global_step, last)
            self._first = state.global_step + 1

    def complete_logs(self, trainer: Trainer, logs: dict[str, float]) -> None:
        """Put seconds, memory and bytes beside a training loss, before anybody sees the entry."""
        if "learning_rate" not in logs and "train_runtime" not in logs:
            return
        if self._prepared is not None:
            logs["preparation_seconds"], self._prepared = self._prepared, None
        if "learning_rate" in logs and self._seconds:
            logs["step_seconds"] = sum(self._seconds) / len(self._seconds)
            self._seconds = []
        memory = peak_memory()
        if memory is not None:
            logs["peak_memory_mib"] = memory / 2**20
        sent = self._sent_since(trainer)
        if sent is not None:
            logs["sent_mib_per_step"] = sent / 2**20

    def _sent_since(self, trainer: Trainer) -> float | None:
        """Bytes that this process sent per step since the last entry, where heads are shared out."""
        traffic = getattr(getattr(trainer, "head_parallel", None), "traffic", None)
        if traffic is None:
            return None
        total, before = (sum(traffic.sent.values()), traffic.steps), self._sent
        self._sent = total if total[1] >= before[1] else (0, 0)
        steps = total[1] - before[1]
        return (total[0] - before[0]) / steps if steps > 0 else None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """A stock Trainer asks nobody before: its own entry is completed."""
        trainer = calling_trainer(self)
        if not hasattr(trainer, "planner") and state.log_history:
            self.complete_logs(trainer, state.log_history[-1])
        self._leave_out()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Evaluation is no part of a step."""
        self._leave_out()

    def _leave_out(self) -> None:
        """What passed since the end of a step counts for none."""
        if self._mark is not None:
            self._mark = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Write the record, for a run that may be resumed."""
        self._write_record(args, state)
        self._leave_out()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """Write record and report."""
        self._write_record(args, state)
        if self.path is not None and state.is_world_process_zero:
            from ..report import write_page

            write_page(self.record, self.path, self.against)

    def _write_record(self, args: TrainingArguments, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            return
        trainer = calling_trainer(self)
        self.record.history = [dict(entry) for entry in state.log_history]
        self.record.about = about(trainer)
        self._note_planner(getattr(trainer, "planner", None))
        with replacing(os.path.join(args.output_dir, RUN_FILE)) as partial, open(partial, "w") as file:
            file.write(self.record.to_json())

    def _note_planner(self, planner: Any) -> None:
        if planner is None:
            return
        record = self.record
        record.schedule = None if planner.counts.last is None else planner.counts.last.to_dict()
        record.blocks = planner.partition.subnet_blocks.tolist()
        record.scores = {name: table.mean.tolist() for name, table in planner.scores.items()}
        if planner.source.magnitude is not None:
            record.scores["weight_magnitude"] = np.asarray(planner.source.magnitude[1], dtype=float).tolist()


def about(trainer: Trainer) -> dict[str, Any]:
    """What a report says of how a run was made."""
    model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    planner = getattr(trainer, "planner", None)
    base = base_model(model)
    facts: dict[str, Any] = {
        "model": getattr(base.config, "_name_or_path", "") or type(base).__name__,
        "class": type(base).__name__,
        "method": "plain" if planner is None else "D2FT",
        **_of_parameters(model),
    }
    if planner is not None:
        config, budget = planner.config, planner.config.budget
        limits = {"compute": budget.compute, "communication": budget.communication, "num_full": budget.num_full}
        facts |= {"LoRA rank": config.r, "policy": config.policy} | {
            f"budget, {name}": value for name, value in limits.items() if value is not None
        }
    facts |= {
        "samples": len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
        "micro-batches of a step": args.gradient_accumulation_steps,
        "samples of a micro-batch": args.per_device_train_batch_size,
        "processes": args.world_size,
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type,
        "learning rate": args.learning_rate,
        "seed": args.seed,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _of_parameters(model: nn.Module) -> dict[str, int]:
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trained parameters": sum(p.numel() for p in trained),
        "gradient bytes": sum(p.nbytes for p in trained),
    }


def peak_memory() -> int | None:
    """Most bytes so far: allocated on the GPU, else those of the whole process, or None where nobody counts them."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
