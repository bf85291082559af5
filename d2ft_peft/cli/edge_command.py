"""``d2ft edge``: fine-tune a model whose frozen blocks a cloud runs, on data that stay here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import transformers as tf
import typer
from peft import LoraConfig, PeftModel
from transformers import Trainer

from ..dlora import KillReviveCallback
from .answer import JSON, amount, answer, console
from .architecture_choice import has_new_head, model_on_meta, read_config
from .data_columns import Columns
from .foreseen import head_names
from .options import Batch, CacheDir, Column, Data, ImageSize, MicroBatches, Model, MostTokens, TaskOfData, TrainSamples
from .side_by_side import accuracy, usual_rate
from .task_data import Task, load_task
from .trainer_arguments import trainer_arguments


_EPILOG = (
    "Example: d2ft edge localhost:50051 ./llama notes.txt --output-dir out --active 8 --packing bf16. Any other option "
    "of transformers.TrainingArguments is taken as well."
)


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command("edge", epilog=_EPILOG, context_settings=settings)(edge)


def edge(
    context: typer.Context,
    address: Annotated[str, typer.Argument(help="host:port of a cloud (d2ft cloud).")],
    model: Model,
    data: Data,
    output_dir: Annotated[Path, typer.Option(help="Folder of the adapter, and of checkpoints.")],
    r: Annotated[int, typer.Option("--r", help="Rank of LoRA.")] = 8,
    target_modules: Annotated[list[str] | None, typer.Option(help="Layers with an adapter; all linear ones.")] = None,
    active: Annotated[int | None, typer.Option(help="Adapter modules that train at a time; all without it.")] = None,
    interval: Annotated[int, typer.Option(help="Steps between two choices of them.")] = 50,
    edge_blocks: Annotated[tuple[int, int], typer.Option(help="Lowest and uppermost blocks that run here.")] = (0, 0),
    head: Annotated[str, typer.Option(help="edge or cloud: where head and labels are.")] = "edge",
    crossing: Annotated[str, typer.Option(help="hidden, or core: r numbers for each module.")] = "hidden",
    packing: Annotated[str, typer.Option(help="none, bf16 or int8: how it crosses.")] = "none",
    dtype: Annotated[str, typer.Option(help="Of weights and computation, as in the cloud.")] = "auto",
    patience: Annotated[float, typer.Option(help="Seconds after which a silent cloud is given up.")] = 600.0,
    authority: Annotated[str | None, typer.Option(help="PEM file of who signed the cloud's certificate.")] = None,
    certificate: Annotated[str | None, typer.Option(help="PEM file of the own certificate, for mutual TLS.")] = None,
    key: Annotated[str | None, typer.Option(help="PEM file of its private key.")] = None,
    tls: Annotated[bool, typer.Option("--tls", help="TLS by the system's authorities.")] = False,
    token_file: Annotated[Path | None, typer.Option(help="File with what the cloud knows this edge by.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="3e-4.")] = None,
    batch: Batch = 8,
    micro_batches: MicroBatches = 1,
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
    resume: Annotated[str | None, typer.Option(help="Checkpoint to resume from.")] = None,
    cache_dir: CacheDir = None,
    as_json: JSON = False,
) -> None:
    """Fine-tune by LoRA on data that stay here; a cloud runs the frozen blocks (DLoRA). The adapter is a plain one."""

    def work() -> dict[str, Any]:
        from ..dlora import Certificates, CloudError, CloudProgressCallback, connect  # grpc is an extra

        callbacks = [CloudProgressCallback()]
        if active is not None:
            callbacks.append(KillReviveCallback(active=active, interval=interval))
        secured = tls or any(one is not None for one in (authority, certificate, key))
        certificates = Certificates(authority, certificate, key) if secured else None
        token = None if token_file is None else token_file.read_text().strip()
        columns = Columns(image_column, text_column, label_column, prompt_column, completion_column)
        rate = learning_rate or usual_rate(r)
        arguments = trainer_arguments("edge", context.args, output_dir, rate, batch, micro_batches)
        tf.set_seed(arguments.seed)
        most = max_train_samples, max_eval_samples
        found = load_task(model, data, columns, task, sequence_length, image_size, most, cache_dir=cache_dir)
        try:
            adapted = connect(
                address, model, _adapter(found, r, target_modules), model_class=found.model_class, dtype=dtype,
                edge_blocks=edge_blocks, head=head, crossing=crossing, packing=packing, certificates=certificates,
                token=token, patience=patience, **found.options,
            )  # fmt: skip
            trainer = Trainer(
                adapted, arguments, train_dataset=found.train, eval_dataset=found.held_out,
                data_collator=found.collate, processing_class=found.processor, callbacks=callbacks,
                compute_metrics=None if found.name == "causal-lm" or head == "cloud" else accuracy,
            )  # fmt: skip
            return {"output_dir": str(output_dir), "task": found.name, **_run(trainer, adapted, resume)}
        except CloudError as error:
            raise ValueError(str(error)) from error

    answer(work, _show, as_json)


def _adapter(task: Task, r: int, targets: list[str] | None) -> LoraConfig:
    """LoRA on the layers that were named, or on all linear ones; the head is new where the task is to classify."""
    heads = head_names(model_on_meta(read_config(task.model), task.name)) if has_new_head(task.name) else None
    return LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=targets or "all-linear", modules_to_save=heads, exclude_modules=heads
    )


def _run(trainer: Trainer, model: PeftModel, resume: str | None) -> dict[str, Any]:
    """Evaluate, train, evaluate, save; the cloud is left in any case."""
    try:
        before = trainer.evaluate()
        result = trainer.train(resume_from_checkpoint=resume)
        after = trainer.evaluate()
        trainer.save_model()
        traffic = model.remote_span.link.traffic
        return {
            "metrics": {"eval_loss_before": before["eval_loss"], **result.metrics, **after},
            "traffic": {
                "sent_bytes": traffic.sent, "received_bytes": traffic.received, "round_trips": traffic.round_trips,
                "replays": traffic.replays,
            },
        }  # fmt: skip
    finally:
        model.disconnect()


def _show(found: dict[str, Any]) -> None:
    metrics, traffic = found["metrics"], found["traffic"]
    says = [
        f"loss {metrics['eval_loss_before']:.4f} before, {metrics['eval_loss']:.4f} after",
        f"{metrics['train_runtime']:.0f} s",
        f"{amount(traffic['sent_bytes'], 'B')} up, {amount(traffic['received_bytes'], 'B')} down",
        f"{traffic['round_trips']} round trips",
    ]
    if "eval_accuracy" in metrics:
        says.insert(0, f"accuracy {metrics['eval_accuracy']:.1%}")
    console().print(f"edge, {found['task']}: {', '.join(says)}; saved in {found['output_dir']}")
