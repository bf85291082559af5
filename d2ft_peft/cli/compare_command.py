"""``d2ft compare``: does it pay on this model and these data? Short runs side by side, and a verdict."""

from __future__ import annotations

import os
from typing import Annotated, Any

import numpy as np
import torch
import typer

from .answer import JSON, amount, answer, console, table
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
from .side_by_side import D2FT, FEWER, PLAIN, WAYS, Measured, Setting, side_by_side, usual_rate
from .task_data import load_task
from .verdict import Interval, judge


_EPILOG = "Example: d2ft compare ./minilm reviews.csv --steps 60 --seeds 3 --learning-rate 1e-4"


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare", epilog=_EPILOG)(compare)


def compare(
    model: Model,
    data: Data,
    budget: Annotated[float, typer.Option(help="Share of the compute that D2FT may take.")] = 0.6,
    r: Rank = None,
    policy: Policy = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps of a run.")] = 30,
    seeds: Annotated[int, typer.Option(help="Runs of each way; the verdict needs at least 2.")] = 3,
    chunk: Annotated[int, typer.Option(help="Steps after which another run goes on.")] = 3,
    learning_rate: LearningRate = None,
    batch: Batch = 8,
    micro_batches: MicroBatches = 5,
    sequence_length: MostTokens = None,
    image_size: ImageSize = None,
    max_train_samples: TrainSamples = None,
    max_eval_samples: Annotated[int, typer.Option(help="Samples that the loss at the end is measured on.")] = 500,
    tolerance: Annotated[float, typer.Option(help="How much higher a loss counts as equal, relative.")] = 0.02,
    task: TaskOfData = None,
    text_column: Column = None,
    label_column: Column = None,
    image_column: Column = None,
    prompt_column: Column = None,
    completion_column: Column = None,
    cache_dir: CacheDir = None,
    as_json: JSON = False,
) -> None:
    """Train plainly, on fewer samples, and by D2FT, side by side, and say whether D2FT is worth it here.

    The three take turns every few steps, so that a busy machine slows all of them alike; each seed gives one loss.
    """

    def work() -> dict[str, Any]:
        _check(steps, seeds, chunk, batch, micro_batches, tolerance, budget)
        columns = Columns(image_column, text_column, label_column, prompt_column, completion_column)
        most = max_train_samples, max_eval_samples
        found = load_task(model, data, columns, task, sequence_length, image_size, most, cache_dir=cache_dir)
        rate = learning_rate or usual_rate(r)
        setting = Setting(steps, chunk, micro_batches, batch, rate, r, budget, policy)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        return {
            "model": model, "data": data, "task": found.name, "columns": vars(found.columns),
            "train_samples": len(found.train), "held_out_samples": len(found.held_out),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "setting": vars(setting), "seeds": seeds,
            **compared(side_by_side(found, setting, seeds), setting, tolerance),
        }  # fmt: skip

    answer(work, _show, as_json)


def _check(steps: int, seeds: int, chunk: int, batch: int, micro_batches: int, tolerance: float, budget: float) -> None:
    for name, value in (("seeds", seeds), ("chunk", chunk), ("batch", batch), ("micro_batches", micro_batches)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if not 0 < budget <= 1:
        raise ValueError(f"budget={budget:g} must be in (0, 1].")
    if round(steps * budget) < 2 * chunk:
        raise ValueError(
            f"steps={steps} leaves fewer samples less than two chunks of {chunk} steps at budget={budget:g}; give at "
            f"least {int(np.ceil(2 * chunk / budget))} steps, or a smaller chunk."
        )
    if tolerance < 0:
        raise ValueError(f"tolerance={tolerance:g} must not be negative.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("d2ft compare runs on one process; start it without torchrun or accelerate launch.")


def compared(runs: dict[str, list[Measured]], setting: Setting, tolerance: float) -> dict[str, Any]:
    """Rows of the ways, and the verdict over them.

    Args:
        runs: By way, over the seeds.
        setting: How they were made.
        tolerance: See `judge`.
    """
    plain = runs[PLAIN]
    rows, times, losses = [], {}, {}
    for way in WAYS:
        measured = runs[way]
        ratios = [b / a for one, base in zip(measured, plain, strict=True) for b, a in zip(one.chunks, base.chunks)]  # noqa: B905
        share = setting.steps_of(way) / setting.steps
        times[way] = Interval.of_ratios([share * ratio for ratio in ratios])
        losses[way] = Interval.of(
            [(one.loss - base.loss) / abs(base.loss) for one, base in zip(measured, plain, strict=True)]
        )
        memory = [one.memory for one in measured if one.memory is not None]
        rows.append(
            {
                "way": way,
                "step_seconds": float(np.mean([seconds for one in measured for seconds in one.chunks])),
                "preparation_seconds": float(np.mean([one.prepared for one in measured])),
                "time": None if way == PLAIN else times[way].as_json(),
                "memory_bytes": max(memory, default=None),
                "loss": Interval.of([one.loss for one in measured]).as_json(),
                "loss_difference": None if way == PLAIN else losses[way].as_json(),
                **{name: float(np.mean([one.metrics[name] for one in measured])) for name in measured[0].metrics},
                **{name: float(np.mean([one.logged[name] for one in measured])) for name in measured[0].logged},
            }
        )
    beside = Interval.of(
        [(one.loss - few.loss) / abs(few.loss) for one, few in zip(runs[D2FT], runs[FEWER], strict=True)]
    )
    accuracy = None
    if "accuracy" in plain[0].metrics:
        pairs = zip(runs[D2FT], plain, strict=True)
        accuracy = Interval.of([one.metrics["accuracy"] - base.metrics["accuracy"] for one, base in pairs])
    verdict = judge(times[D2FT], losses[D2FT], beside, tolerance, accuracy)
    return {
        "rows": rows,
        "accuracy_difference": None if accuracy is None else accuracy.as_json(),
        "beside_fewer_samples": beside.as_json(),
        "verdict": {**verdict.as_json(), "text": str(verdict)},
    }


def _show(found: dict[str, Any]) -> None:
    out, setting = console(), found["setting"]
    out.print(
        f"{found['model']} on {found['data']} ({found['task']}): {setting['steps']} steps of "
        f"{setting['micro_batches']} x {setting['batch_size']} samples, {found['seeds']} seeds, loss on "
        f"{found['held_out_samples']} held-out samples, {found['device']}\n"
    )
    has_accuracy = "accuracy" in found["rows"][0]
    rows = []
    for row in found["rows"]:
        cells = [
            row["way"], f"{row['step_seconds']:.3f}", _ratio(row["time"]),
            "-" if row["memory_bytes"] is None else amount(row["memory_bytes"], "B"),
            f"{row['loss']['mean']:.4f}", _difference(row["loss_difference"]),
        ]  # fmt: skip
        rows.append(cells + ([f"{row['accuracy']:.1%}"] if has_accuracy else []))
    columns = ["", "step, s", "time, plain = 1", "peak memory", "loss", "against plain"]
    out.print(table(columns + (["accuracy"] if has_accuracy else []), rows))
    prepared = found["rows"][-1]["preparation_seconds"] - found["rows"][0]["preparation_seconds"]
    out.print(
        "\nIn brackets: 95 % intervals, of time over chunks of steps, of loss over seeds. Before its first step D2FT "
        f"took {prepared:+.1f} s more than plain, which a longer run pays once."
    )
    out.print(f"\n{found['verdict']['text'][0].upper()}{found['verdict']['text'][1:]}")


def _ratio(one: dict[str, float] | None) -> str:
    return "1" if one is None else _with_bounds(one, ".2f")


def _difference(one: dict[str, float] | None) -> str:
    return "" if one is None else _with_bounds(one, "+.1%")


def _with_bounds(one: dict[str, float], form: str) -> str:
    bounds = "" if not np.isfinite(one["high"]) else f" ({one['low']:{form}} to {one['high']:{form}})"
    return f"{one['mean']:{form}}{bounds}"
