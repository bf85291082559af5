"""``d2ft plan``: what a budget saves on a model, from its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .answer import JSON, amount, answer, console, share, table
from .architecture_choice import TASKS, choose_task, read_config
from .foreseen import Foresight, subnets_table
from .options import Batch, ImageSize, MicroBatches, Rank


_EPILOG = "Example: d2ft plan llama --r 8 --sequence-length 1024 --budget 0.6 --budget 0.4 --png schedule.png"


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plan", epilog=_EPILOG)(plan)


def plan(
    model: Annotated[str, typer.Argument(help="Folder with config.json, model type (llama, vit, ...), or Hub id.")],
    budget: Annotated[list[float], typer.Option(help="Share of the compute; give it several times.")] = [0.6],  # noqa: B006
    policy: Annotated[str | None, typer.Option(help="Scheduling policy, as D2FTConfig has it.")] = None,
    r: Rank = None,
    task: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(TASKS)}; else what the model was made for.")
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens of a sample.")] = None,
    image_size: ImageSize = None,
    batch: Batch = 8,
    micro_batches: MicroBatches = 5,
    heads_per_subnet: Annotated[int, typer.Option(help="Heads that one subnet groups.")] = 1,
    devices: Annotated[int, typer.Option(help="Devices that would share out the heads, for the bytes of rows.")] = 2,
    png: Annotated[Path | None, typer.Option(help="Draw the first budget's schedule.")] = None,
    subnets: Annotated[bool, typer.Option("--subnets", help="Also print the subnets of every block.")] = False,
    as_json: JSON = False,
) -> None:
    """Say what a model costs to fine-tune, and what each budget saves, from its configuration alone.

    No weights are loaded: the model is built without values, so any size will do. What padding and unread rows save
    depends on the data, and comes on top.
    """

    def work() -> dict[str, Any]:
        config = read_config(model)
        chosen = choose_task(config, task)
        foresight = Foresight(
            config, chosen, micro_batches, batch, sequence_length, image_size,
            r=r, policy=policy, heads_per_subnet=heads_per_subnet,
        )  # fmt: skip
        answered: dict[str, Any] = {
            "model": model,
            **foresight.facts(),
            "counts_head": foresight.counts_head,
            "devices": devices,
            "budgets": [],
        }
        if subnets:
            answered["subnets_table"] = subnets_table(config, chosen, foresight.tokens, heads_per_subnet)
        for index, one in enumerate(budget):
            foreseen, schedule = foresight.under(one, devices)
            answered["budgets"].append({**foreseen, "schedule": schedule.operations})
            if png is not None and index == 0:
                from ..report import plot_schedule

                answered["png"] = str(plot_schedule(schedule, png))
        return answered

    answer(work, _show, as_json)


def _show(found: dict[str, Any]) -> None:
    out = console()
    out.print(
        f"{found['model']}: {found['model_type']} for {found['task']}, {found['blocks']} blocks, "
        f"{found['subnets']} subnets, samples of {found['tokens']} tokens"
    )
    out.print(
        f"trains {found['trained_parameters']:,} of {found['parameters']:,} parameters; a sample takes "
        f"{amount(found['forward_flops'], 'FLOP')} forward, {amount(found['backward_flops'], 'FLOP')} backward"
    )
    out.print(
        f"memory: weights {amount(found['weight_bytes'], 'B')}, gradients {amount(found['gradient_bytes'], 'B')}, "
        f"AdamW {amount(found['optimizer_bytes'], 'B')}, activations of a micro-batch of {found['batch_size']} "
        f"{'unknown' if found['kept_bytes'] is None else amount(found['kept_bytes'], 'B')}\n"
    )
    if "subnets_table" in found:
        out.print(found["subnets_table"] + "\n")
    rows = [
        [
            f"{one['budget']:g}", one["policy"], share(one["flops_ratio"]), share(1 - one["flops_ratio"]),
            share(one["kept_ratio"]), share(one["communication_ratio"]), _rows(one),
        ]
        for one in found["budgets"]
    ]  # fmt: skip
    columns = ["budget", "policy", "FLOPs", "saved", "activations", "communication"]
    out.print(table([*columns, f"rows sent, {found['devices']} devices"], rows))
    out.print(
        "\nactivations: at the peak, of a micro-batch. Data parallelism exchanges the same gradients "
        f"({amount(found['gradient_bytes'], 'B')}) under every budget;\nrows are what a head-parallel step sends, "
        "beside tensor parallelism. Padding and unread rows, which the data decide, are not counted."
    )
    if not found["counts_head"]:
        out.print("The forward pass looks at values: embeddings and head, which have none here, are not counted.")
    if any(one["scores_drawn"] for one in found["budgets"]):
        out.print("The policy reads scores of weights and samples, which were drawn at random here.")
    if "png" in found:
        out.print(f"schedule: {found['png']}")


def _rows(one: dict[str, Any]) -> str:
    if one["row_bytes"] is None:
        return "-"
    return f"{amount(one['row_bytes'], 'B')} of {amount(one['row_bytes_of_tensor_parallel'], 'B')}"
