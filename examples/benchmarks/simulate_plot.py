"""Predicted throughput of 8 to 1024 devices, as a picture and a table; see `simulate.py`.

Nothing here was measured. The devices and links are assumptions, typical of what vendors state for current data-centre
accelerators, at the efficiency that training codes report:

- a device achieves 400 TFLOP/s in bf16 (0.4 of its peak), needs 20 us for a pass of a branch besides, moves rows
  through norms at 200 GB/s (13 passes over memory of 3 TB/s), and holds 80 GB;
- eight of them form a node, and are a group that shares out one model: 300 GB/s per device and direction, 20 us;
- groups sum gradients over 50 GB/s per device and direction, 30 us.

A group's step is 40 micro-batches, of which D2FT runs 24 FULL (3F+2S) or 16 FULL and 8 FORWARD_ONLY (2F+1O+2S). With
five micro-batches some of the eight devices would have no rows of their own, and the others' links would be the limit.
Samples count whether D2FT runs or skips them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import transformers as tf
from rows import pyplot, save

from d2ft_peft.head_parallel import balanced_capacities, place_subnets
from d2ft_peft.head_parallel.rank_planner import by_rank
from d2ft_peft.schedule import Budget, Problem, Schedule, get_policy
from d2ft_peft.simulate import (
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


DEVICE = Device(400e12, overhead=20e-6, row_bandwidth=200e9, memory=80e9)
GROUP = 8
WITHIN = Link(20e-6, 300e9)
ACROSS = Link(30e-6, 50e9)
SLOW_WITHIN = Link(20e-6, 20e9)
MICRO_BATCHES = 40
REPLICAS = (1, 2, 4, 8, 16, 32, 64, 128)
STYLES = {
    "tensor parallel": ("C0", "-"), "tensor parallel, 3 of 5": ("C0", ":"), "D2FT 3F+2S": ("C1", "-"),
    "D2FT 3F+2S, by speed": ("C3", "-"), "D2FT 2F+1O+2S": ("C1", "--"), "D2FT 3F+2S, overlapped": ("C1", ":"),
    "DDP": ("C4", "-"), "DDP, 3 of 5": ("C4", ":"), "FSDP2": ("C2", "-"), "FSDP2, 3 of 5": ("C2", ":"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and the samples of one of its micro-batches."""

    name: str
    workload: Workload
    size: int


def cases() -> Iterator[Case]:
    with torch.device("meta"):
        shape = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24, "intermediate_size": 4096}
        model = tf.ViTForImageClassification(tf.ViTConfig(**shape))
        batch = {"pixel_values": torch.ones(1, 3, 224, 224)}
        yield Case("ViT-L, full", workload_of_model(model, batch, bytes_per_number=2, state_bytes=14), 8)
        shape = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80}
        config = tf.LlamaConfig(**shape, intermediate_size=28672, vocab_size=128256, attn_implementation="eager")
        ids = torch.ones(1, 4096, dtype=torch.long)
        model, batch = tf.LlamaForCausalLM(config), {"input_ids": ids, "attention_mask": ids, "use_cache": False}
        lora = workload_of_model(model, batch, bytes_per_number=2, state_bytes=14, lora_rank=16)
        yield Case("Llama 70B, 4096 tokens, LoRA", lora, 1)


def planned(case: Case, budget: Budget) -> Schedule:
    """The schedule that the engine's default policy makes, where all scores are alike."""
    partition = case.workload.partition
    ranks = place_subnets(partition, GROUP)
    forward = sum(case.workload.forward(branch) for branch in partition.branches)
    backward = sum(case.workload.backward(branch) for branch in partition.branches)
    scores = np.ones((MICRO_BATCHES, len(ranks)))
    costs = np.tile([0.0, forward / (forward + backward), 1.0], (len(ranks), 1))
    weights = np.full(MICRO_BATCHES, case.size)
    problem = Problem(scores, scores, budget, costs, weights, ranks, partition.subnet_blocks)
    return by_rank(get_policy("bilevel"), ranks)(problem)


def group(mixed: bool, within: Link, replicas: int) -> Cluster:
    speeds = [0.5 if mixed and rank % 2 else 1.0 for rank in range(GROUP)]
    return Cluster(tuple(DEVICE.at_speed(speed) for speed in speeds), within, replicas, ACROSS)


def predictions(case: Case, mixed: bool, within: Link = WITHIN) -> dict[str, list[Prediction]]:
    """Predictions by variant, for every number of replicas."""
    clusters = [group(mixed, within, replicas) for replicas in REPLICAS]
    n, size = MICRO_BATCHES, case.size
    three, two = planned(case, Budget(num_full=24)), planned(case, Budget(num_full=16, num_forward_only=8))
    workload, found = case.workload, {}
    found["tensor parallel"] = [tensor_parallel(workload, c, n * size) for c in clusters]
    found["tensor parallel, 3 of 5"] = [tensor_parallel(workload, c, 24 * size, n * size) for c in clusters]
    found["D2FT 3F+2S"] = [head_parallel(workload, c, three) for c in clusters]
    if mixed:
        capacities = balanced_capacities(1 / clusters[0].flops, np.ones(GROUP), 0.6)
        by_speed = planned(case, Budget(compute=tuple(capacities)))
        found["D2FT 3F+2S, by speed"] = [head_parallel(workload, c, by_speed) for c in clusters]
    else:
        found["D2FT 2F+1O+2S"] = [head_parallel(workload, c, two) for c in clusters]
        found["D2FT 3F+2S, overlapped"] = [head_parallel(workload, c, three, overlap=True) for c in clusters]
    found["DDP"] = [data_parallel(workload, c, n * size) for c in clusters]
    found["DDP, 3 of 5"] = [data_parallel(workload, c, 24 * size, n * size) for c in clusters]
    found["FSDP2"] = [data_parallel(workload, c, n * size, sharded=True) for c in clusters]
    found["FSDP2, 3 of 5"] = [data_parallel(workload, c, 24 * size, n * size, sharded=True) for c in clusters]
    return found


def draw(path: str) -> str:
    """Write the picture; returns the table of 64 devices."""
    plt, every = pyplot(), list(cases())
    figure, axes = plt.subplots(len(every), 2, figsize=(10, 3.6 * len(every)), squeeze=False)
    lines = ["| samples per second and device, 64 devices | " + " | ".join(STYLES) + " |"]
    lines.append("|---" * (len(STYLES) + 1) + "|")
    for row, case in zip(axes, every, strict=True):
        for axis, mixed in zip(row, (False, True), strict=True):
            what = "half the devices at half speed" if mixed else "devices alike"
            found = predictions(case, mixed)
            panel(axis, found)
            axis.set_title(f"{case.name}; {what}", fontsize=9)
            lines.append(in_table(f"{case.name}; {what}", found))
        slow = predictions(case, False, SLOW_WITHIN)
        lines.append(in_table(f"{case.name}; devices alike, 20 GB/s within a group", slow))
    marks = [plt.Line2D([], [], color=color, linestyle=line, label=name) for name, (color, line) in STYLES.items()]
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.legend(handles=marks, loc="lower center", ncols=5, fontsize=8, frameon=False)
    save(figure, path)
    return "\n".join(lines)


def panel(axis, found: dict[str, list[Prediction]]) -> None:
    devices = [GROUP * replicas for replicas in REPLICAS]
    too_large = []
    for name, of_all in found.items():
        values = [p.throughput / d if p.fits else np.nan for p, d in zip(of_all, devices, strict=True)]
        if not any(p.fits for p in of_all):
            too_large.append(f"{name} does not fit: {of_all[0].memory / 1e9:.0f} GB")
        color, line = STYLES[name]
        axis.plot(devices, values, color=color, linestyle=line, marker=".", markersize=4)
    axis.text(0.02, 0.03, "\n".join(too_large), transform=axis.transAxes, fontsize=7)
    axis.set_xscale("log", base=2)
    axis.set_xticks(devices, [str(d) for d in devices])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("devices", fontsize=8)
    axis.set_ylabel("samples per second and device", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)


def in_table(name: str, found: dict[str, list[Prediction]]) -> str:
    cells = []
    for variant in STYLES:
        at_64 = found[variant][REPLICAS.index(8)] if variant in found else None
        fits = "too large" if at_64 else "-"
        cells.append(
            f"{at_64.throughput / 64:,.{0 if at_64.throughput > 64 else 3}f}" if at_64 and at_64.fits else fits
        )
    return f"| {name} | " + " | ".join(cells) + " |"
