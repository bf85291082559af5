"""``d2ft simulate``: what a step would take on devices that are not here."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import typer

from ..head_parallel import place_subnets
from ..schedule import Budget, Problem, Schedule, get_policy
from ..simulate import (
    Cluster,
    Device,
    Link,
    Prediction,
    Workload,
    data_parallel,
    head_parallel,
    tensor_parallel,
    workload_of_model,
)
from .answer import JSON, amount, answer, console, table
from .architecture_choice import batch_on_meta, choose_task, model_on_meta, read_config
from .options import ImageSize


_EPILOG = "Example: d2ft simulate llama --devices 8 --flops 4e14 --bandwidth 3e11 --latency 2e-5 --lora-rank 16"


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("simulate", epilog=_EPILOG)(simulate)


def simulate(
    model: Annotated[str, typer.Argument(help="Folder with config.json, model type, or Hub id.")],
    devices: Annotated[int, typer.Option(help="Devices that share out one model.")] = 2,
    flops: Annotated[list[float], typer.Option(help="FLOP/s of a device; once, or once for each.")] = [1e14],  # noqa: B006
    overhead: Annotated[float, typer.Option(help="Seconds of a pass of a branch besides.")] = 2e-5,
    memory: Annotated[float, typer.Option(help="Bytes of a device.")] = 80e9,
    latency: Annotated[float, typer.Option(help="Seconds of an exchange besides.")] = 2e-5,
    bandwidth: Annotated[float, typer.Option(help="Bytes per second and direction.")] = 5e10,
    budget: Annotated[float, typer.Option(help="Share of the compute of the D2FT step.")] = 0.6,
    micro_batches: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 40,
    batch: Annotated[int, typer.Option(help="Samples of a micro-batch.")] = 1,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of LoRA; full fine-tuning without it.")] = None,
    bytes_per_number: Annotated[int, typer.Option(help="2 for bf16, 4 for fp32.")] = 2,
    task: Annotated[str | None, typer.Option(help="As in d2ft plan.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens of a sample.")] = None,
    image_size: ImageSize = None,
    as_json: JSON = False,
) -> None:
    """Predict a training step: heads shared out by D2FT, tensor parallelism, DDP and FSDP2, on the same devices.

    Nothing is measured: what comes out says what the numbers that you give say. docs/simulator.md holds the same
    predictions against measurements.
    """

    def work() -> dict[str, Any]:
        if len(flops) not in (1, devices):
            raise ValueError(f"flops is given {len(flops)} times; give it once, or once for each of {devices} devices.")
        config = read_config(model)
        chosen = choose_task(config, task)
        sample = batch_on_meta(config, chosen, sequence_length, image_size)
        workload = workload_of_model(
            model_on_meta(config, chosen), {name: value for name, value in sample.items() if name != "labels"},
            bytes_per_number=bytes_per_number, lora_rank=lora_rank,
        )  # fmt: skip
        speeds = flops * devices if len(flops) == 1 else flops
        cluster = Cluster(tuple(Device(one, overhead, memory=memory) for one in speeds), Link(latency, bandwidth))
        rows = predicted(workload, cluster, budget, micro_batches, batch)
        return {"model": model, "tokens": workload.tokens, "devices": devices, "budget": budget, "rows": rows}

    answer(work, _show, as_json)


def predicted(
    workload: Workload, cluster: Cluster, budget: float, micro_batches: int, batch: int
) -> list[dict[str, Any]]:
    """A row for each way to run a step of so many samples, and for the others on D2FT's share of them as well."""
    samples = micro_batches * batch
    fewer = max(1, round(budget * samples))
    schedule = _schedule(workload, cluster.size, budget, micro_batches, batch)
    ways = {
        "D2FT, head-parallel": head_parallel(workload, cluster, schedule),
        "tensor parallel": tensor_parallel(workload, cluster, samples),
        "tensor parallel, fewer samples": tensor_parallel(workload, cluster, fewer, samples),
        "DDP": data_parallel(workload, cluster, samples),
        "DDP, fewer samples": data_parallel(workload, cluster, fewer, samples),
        "FSDP2": data_parallel(workload, cluster, samples, sharded=True),
        "FSDP2, fewer samples": data_parallel(workload, cluster, fewer, samples, sharded=True),
    }
    return [{"way": name, **_figures(one)} for name, one in ways.items()]


def _schedule(workload: Workload, devices: int, budget: float, micro_batches: int, batch: int) -> Schedule:
    """The paper's policy where all scores are alike."""
    partition = workload.partition
    ranks = place_subnets(partition, devices)
    forward, backward = (
        sum(of(branch) for branch in partition.branches) for of in (workload.forward, workload.backward)
    )
    scores = np.ones((micro_batches, len(ranks)))
    costs = np.tile([0.0, forward / (forward + backward), 1.0], (len(ranks), 1))
    weights = np.full(micro_batches, float(batch))
    problem = Problem(scores, scores, Budget(compute=budget), costs, weights, ranks, partition.subnet_blocks)
    return get_policy("bilevel")(problem)


def _figures(one: Prediction) -> dict[str, Any]:
    return {
        "seconds": one.seconds,
        "samples_per_second": one.throughput,
        "sent_bytes": float(max(sum(np.asarray(sent) for sent in one.sent.values()), default=0.0)) if one.sent else 0.0,
        "max_over_mean": one.max_over_mean,
        "memory_bytes": float(one.memory),
        "fits": bool(one.fits),
    }


def _show(found: dict[str, Any]) -> None:
    out = console()
    out.print(
        f"{found['model']}, samples of {found['tokens']} tokens, {found['devices']} devices; nothing was measured\n"
    )
    rows = [
        [
            row["way"], f"{row['seconds']:.4g}", f"{row['samples_per_second']:.4g}", amount(row["sent_bytes"], "B"),
            f"{row['max_over_mean']:.2f}", amount(row["memory_bytes"], "B") + ("" if row["fits"] else ", too large"),
        ]
        for row in found["rows"]
    ]  # fmt: skip
    out.print(table(["", "step, s", "samples/s", "sent by a device", "max/mean", "memory of a device"], rows))
    out.print("\nSamples count whether they run or not, so that rows on fewer samples are the fair neighbours of D2FT.")
