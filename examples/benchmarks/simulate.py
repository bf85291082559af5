"""Checks the simulator against measured runs, and predicts what cannot be run here.

    python examples/benchmarks/simulate.py --measured examples/benchmarks/results/parallel.json
    python examples/benchmarks/simulate.py --png docs/images/simulated.png

Devices and link of the first come from the micro-measurements in the same file, never from the steps that are
predicted. Those of the second are assumptions; they stand at the top of `simulate_plot.py`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rows import command_line
from simulate_plot import draw
from step_time import build_model, make_batch

from d2ft_peft import Schedule
from d2ft_peft.simulate import (
    Cluster,
    Device,
    Link,
    Prediction,
    Workload,
    data_parallel,
    fit_line,
    head_parallel,
    tensor_parallel,
    workload_of_model,
)


def workload_of(setting: dict) -> Workload:
    args = argparse.Namespace(**setting)
    with torch.device("meta"):
        model, batch = build_model(args), make_batch(args, torch.device("meta"))
    if "input_ids" in batch:  # otherwise transformers would look into tensors that have no content
        batch |= {"attention_mask": torch.ones_like(batch["input_ids"]), "use_cache": False}
        model.set_attn_implementation("eager")
    return workload_of_model(model, batch)


def cluster_of(result: dict, workload: Workload) -> Cluster:
    """The processes of a measured run, from the micro-measurements in it."""
    setting, devices = result["setting"], []
    first = {branch.name: branch for branch in workload.partition.branches if branch.block == 0}
    for micro in result["micro"]:
        amounts, seconds = [], []
        for name, samples, forward, backward in micro["branches"]:
            share = samples * first[name].heads / setting["processes"]
            amounts += [share * workload.forward(first[name]), share * workload.backward(first[name])]
            seconds += [forward, backward]
        overhead, flops = fit_line(amounts, seconds)
        size, taken = np.array(micro["rows"]).T
        devices.append(Device(flops, overhead, row_bandwidth=float((size / taken).mean())))
    # A collective is over when its last rank is.
    points = np.array([micro["link"] for micro in result["micro"]]).max(axis=0)
    latency, bandwidth = fit_line(points[:, 0], points[:, 1])
    return Cluster(tuple(devices), Link(latency, bandwidth))


def predict(result: dict, workload: Workload, cluster: Cluster) -> dict[str, Prediction]:
    """Predictions of the variants that the simulator knows."""
    setting = result["setting"]
    n, size = setting["micro_batches"], setting["micro_batch_size"]
    found = {}
    for name, operations in result["schedules"].items():
        schedule = Schedule(operations, [size] * n, blocks=workload.partition.subnet_blocks)
        found[name] = head_parallel(workload, cluster, schedule)
    for name, share in (("tensor parallel", 1.0), ("tensor parallel, 3 of 5", 0.6)):
        found[name] = tensor_parallel(workload, cluster, round(share * n) * size, n * size, cuts_boundary=False)
    found["DDP"] = data_parallel(workload, cluster, n * size, overlap=False)
    found["FSDP2"] = data_parallel(workload, cluster, n * size, overlap=False, sharded=True)
    return found


def validate(result: dict) -> str:
    """A table of measured and predicted figures."""
    workload = workload_of(result["setting"])
    cluster = cluster_of(result, workload)
    devices = "; ".join(
        f"{d.flops / 1e9:.1f} GFLOP/s, {d.overhead * 1e3:.2f} ms a pass, rows {d.row_bandwidth / 1e9:.2f} GB/s"
        for d in cluster.devices
    )
    link = cluster.link
    lines = [
        f"devices: {devices}",
        f"link: {link.latency * 1e3:.2f} ms, {link.bandwidth / 1e9:.2f} GB/s",
        "",
        "| | sent by rank 0, MB | predicted | heads of rank 0, s | predicted | error | step, s | predicted | error |",
        "|---" * 9 + "|",
    ]
    rows = {row["variant"]: row for row in result["rows"] if row["group"] == "equal"}
    for name, prediction in predict(result, workload, cluster).items():
        row = rows[name]
        moved = sum(sent[0] for sent in prediction.sent.values())
        heads = row["compute_seconds"][0] if row["compute_kind"] == "heads" else None
        pairs = (heads, prediction.compute[0]), (row["step_seconds"], prediction.seconds)
        seconds = (f"{m:.3f} | {p:.3f} | {p / m - 1:+.1%}" if m else f"- | {p:.3f} | -" for m, p in pairs)
        lines.append(f"| {name} | {row['sent'][0] / 1e6:.2f} | {moved / 1e6:.2f} | {' | '.join(seconds)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--measured", nargs="*", default=[], help="results of parallel.py to compare with")
    parser.add_argument("--png", default=None, help="file for the picture of 8 to 1024 devices")
    args = parser.parse_args(argv)
    for path in args.measured:
        print(validate(json.loads(Path(path).read_text())), "\n")
    if args.png:
        print(draw(args.png))


if __name__ == "__main__":
    main()
