"""``d2ft train``: fine-tune a model on data, by D2FT or plainly, and save what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import transformers as tf
import typer
from transformers import Trainer

from ..training import D2FTTrainer, ReportCallback
from .answer import JSON, answer, console
from .data_columns import Columns
from .options import (
    Batch,
    CacheDir,
    Column,
    Data,
    ImageSize,
    LearningRate,
    MicroBatches,
    Model,
    MostTokens,
    Policy,
    Rank,
    TaskOfData,
    TrainSamples,
)
from .side_by_side import D2FT, PLAIN, Setting, accuracy, adapt, last_logged, usual_rate
from .task_data import load_task
from .trainer_arguments import trainer_arguments


_EPILOG = (
    "Example: d2ft train ./minilm reviews.csv --output-dir out --max_steps 200 --report out/report.html. Any other "
    "option of transformers.TrainingArguments is taken as well, such as --bf16 or --eval_strategy epoch."
)


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command("train", epilog=_EPILOG, context_settings=settings)(train)


def train(
    context: typer.Context,
    model: Model,
    data: Data,
    output_dir: Annotated[Path, typer.Option(help="Folder of the adapter or model, and of checkpoints.")],
    method: Annotated[str, typer.Option(help="d2ft or plain.")] = "d2ft",
    budget: Annotated[float, typer.Option(help="Share of the compute.")] = 0.6,
    r: Rank = None,
    policy: Policy = None,
    learning_rate: LearningRate = None,
    batch: Batch = 8,
    micro_batches: MicroBatches = 5,
    sequence_length: MostTokens = None,
    image_size: ImageSize = None,
    max_train_samples: TrainSamples = None,
    max_eval_samples: Annotated[int | None, typer.Option(help="Samples to evaluate on.")] = None,
    task: TaskOfData = None,
    text_column: Column = None,
    label_column: Column = None,
    image_column: Column = None,
    prompt_column: Column = None,
    completion_column: Column = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report of the run.")] = None,
    resume: Annotated[str | None, typer.Option(help="Checkpoint to resume from.")] = None,
    cache_dir: CacheDir = None,
    as_json: JSON = False,
) -> None:
    """Fine-tune a model, evaluate it, and save the adapter (or the model, where it is trained plainly)."""

    def work() -> dict[str, Any]:
        if method not in ("d2ft", "plain"):
            raise ValueError(f"method={method!r} must be 'd2ft' or 'plain'.")
        columns = Columns(image_column, text_column, label_column, prompt_column, completion_column)
        most = max_train_samples, max_eval_samples
        rate = learning_rate or usual_rate(r)
        arguments = trainer_arguments("train", context.args, output_dir, rate, batch, micro_batches)
        tf.set_seed(arguments.seed)
        found = load_task(model, data, columns, task, sequence_length, image_size, most, cache_dir=cache_dir)
        way, cls = (D2FT, D2FTTrainer) if method == "d2ft" else (PLAIN, Trainer)
        setting = Setting(micro_batches=micro_batches, batch_size=batch, r=r, budget=budget, policy=policy)
        trainer = cls(
            model=adapt(found, way, setting, arguments.seed), args=arguments, train_dataset=found.train,
            eval_dataset=found.held_out, data_collator=found.collate, processing_class=found.processor,
            compute_metrics=None if found.name == "causal-lm" else accuracy,
            callbacks=[ReportCallback(report)],
        )  # fmt: skip
        result = trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        metrics = {**result.metrics, **trainer.evaluate()}
        metrics |= last_logged(trainer, "flops_ratio", "compute_ratio", "peak_memory_mib")
        return {
            "output_dir": str(output_dir), "task": found.name, "method": method, "metrics": metrics,
            "report": None if report is None else str(report),
        }  # fmt: skip

    answer(work, _show, as_json)


def _show(found: dict[str, Any]) -> None:
    metrics, out = found["metrics"], console()
    parts = [f"loss {metrics['eval_loss']:.4f}", f"{metrics['train_runtime']:.0f} s"]
    if "eval_accuracy" in metrics:
        parts.insert(0, f"accuracy {metrics['eval_accuracy']:.1%}")
    if "flops_ratio" in metrics:
        parts.append(f"{metrics['flops_ratio']:.0%} of plain training's FLOPs")
    out.print(f"{found['method']}, {found['task']}: {', '.join(parts)}; saved in {found['output_dir']}")
    if found["report"] is not None:
        out.print(f"report: {found['report']}")
