"""Two processes of unequal speed: plain data parallelism, and ``device_capacities="auto"``, side by side in one run.

    torchrun --nproc_per_node 2 examples/benchmarks/unequal.py --out examples/benchmarks/results/unequal.json

Each process is pinned to one core and trains a randomly initialised ViT under DistributedDataParallel. A neighbour that
computes without end on the same core makes a process half as fast. First there is none, then process 1 has one, then
process 0 instead: the slow side changes in the middle of training, and nothing tells the training of it.

- ``plain``: stock DDP on the plain model; every process runs the same number of samples.
- ``auto``: D2FT with ``policy="fewer_samples"`` and ``device_capacities="auto"``. All processes together run as many
  samples a step as under ``plain``, all of them FULL.

The variants take turns of a few steps. A process is *ready* when its own backward pass of a step is through, before it
waits for others; its *idle time* is that until the last process is ready (both read the same clock). The exchange of
gradients itself comes after that and is no idle time. Shares of idle time are relative to the whole step, from the end
of one exchange to the end of the next, optimizer included. The first step of a turn is left out. Figures of a phase are
medians over its last steps, when the shares have settled; the trace keeps all steps.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from peft import get_peft_model
from rows import command_line
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTConfig, ViTForImageClassification

from d2ft_peft import D2FTConfig, D2FTPlanner, partition_model


PHASES = {"no process is slow": None, "process 1 is slow": 1, "process 0 is slow": 0}
MicroBatch = tuple[np.ndarray, float, contextlib.AbstractContextManager]
"""Its samples, the factor on its mean loss, and what it runs under."""


class Loop:
    """Optimizer steps of one variant in this process.

    Attributes:
        trace: Of every step: phase, samples here, and the moments "start", "ready" and "end" of the step in seconds.
    """

    def __init__(self, model: torch.nn.Module, args: argparse.Namespace):
        self.args, self.model = args, model
        self.parallel = DistributedDataParallel(model)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        self.rng = np.random.default_rng(dist.get_rank())
        self.trace: list[dict] = []
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.pixels = torch.randn(256, 3, args.image_size, args.image_size, generator=generator)
        self.labels = torch.randint(100, (256,), generator=generator)

    def micro_batches(self, candidates: np.ndarray) -> list[MicroBatch]:
        """What this process runs of its candidates."""
        raise NotImplementedError

    def step(self, phase: str, previous: float) -> float:
        """One optimizer step; returns when its exchange ended."""
        candidates = self.rng.choice(len(self.labels), self.args.candidates, replace=False)
        micro_batches = self.micro_batches(candidates)
        for i, (samples, weight, context) in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with context, contextlib.nullcontext() if last else self.parallel.no_sync():
                batch = {"pixel_values": self.pixels[samples], "labels": self.labels[samples]}
                loss = self.parallel(**batch).loss * weight
                loss.register_hook(lambda grad: Variable._execution_engine.queue_callback(self._ready))
                loss.backward()
        end = time.perf_counter()
        ran = sum(len(samples) for samples, _, _ in micro_batches)
        self.trace.append({"phase": phase, "samples": ran, "start": previous, "ready": self._when, "end": end})
        self.optimizer.step()
        self.optimizer.zero_grad()
        return end

    def _ready(self) -> None:
        self._when = time.perf_counter()


class Plain(Loop):
    """As many samples in every process."""

    def __init__(self, model: torch.nn.Module, args: argparse.Namespace):
        projections = partition_model(model).projections
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[0] in projections or name.startswith("classifier"))
        super().__init__(model, args)
        self.samples = round(args.budget * args.candidates)

    def micro_batches(self, candidates):
        parts = np.array_split(candidates[: self.samples], -(-self.samples // self.args.size))
        return [(part, len(part) / self.samples, contextlib.nullcontext()) for part in parts]


class Auto(Loop):
    """As many samples as the process has time for."""

    def __init__(self, model: torch.nn.Module, args: argparse.Namespace):
        config = D2FTConfig(
            policy="fewer_samples", compute_budget=args.budget, device_capacities="auto", interval=args.interval,
            modules_to_save=["classifier"],
        )  # fmt: skip
        super().__init__(get_peft_model(model, config), args)
        self.planner = D2FTPlanner(self.model)
        self.planner.prepare({"pixel_values": self.pixels[:1], "labels": self.labels[:1]})

    def micro_batches(self, candidates):
        planner = self.planner
        return [
            (candidates[positions], planner.peek(index).weight, planner.micro_batch(index))
            for index, positions in enumerate(planner.compose(candidates, self.args.size))
        ]


@contextlib.contextmanager
def neighbour() -> Iterator[Callable[[bool], None]]:
    """A process that computes without end on this process's core, while it is switched on."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    process.send_signal(signal.SIGSTOP)
    try:
        yield lambda on: process.send_signal(signal.SIGCONT if on else signal.SIGSTOP)
    finally:
        process.kill()


def measure(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Run all phases; the trace of each variant in this process."""
    config = ViTConfig(
        hidden_size=args.hidden, num_attention_heads=args.heads, num_hidden_layers=args.layers,
        intermediate_size=4 * args.hidden, image_size=args.image_size, num_labels=100,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTForImageClassification(config).train()
    loops = {"plain": Plain(copy.deepcopy(model), args), "auto": Auto(model, args)}
    with neighbour() as switch:
        for phase, slow in PHASES.items():
            switch(slow == dist.get_rank())
            for turn in range(args.turns):
                for loop in loops.values():
                    dist.barrier()
                    previous = time.perf_counter()
                    for step in range(args.steps):
                        previous = loop.step(phase, previous)
                        loop.trace[-1] |= {"step": turn * args.steps + step, "first": step == 0}
    return {name: loop.trace for name, loop in loops.items()}


def join(traces: list[list[dict]]) -> list[dict]:
    """Steps with what all processes saw of them."""
    steps = []
    for parts in zip(*traces, strict=True):
        last = max(part["ready"] for part in parts)
        seconds = statistics.mean(part["end"] - part["start"] for part in parts)
        steps.append({key: parts[0][key] for key in ("phase", "step", "first")} | {
            "samples": [part["samples"] for part in parts],
            "seconds": seconds,
            "idle": [(last - part["ready"]) / seconds for part in parts],
            "exchange": (max(part["end"] for part in parts) - last) / seconds,
        })  # fmt: skip
    return steps


def summarize(steps: list[dict], settled: int) -> dict[str, dict]:
    """Medians over the steps of each phase from step `settled` on."""
    summary = {}
    for phase in PHASES:
        chosen = [s for s in steps if s["phase"] == phase and s["step"] >= settled and not s["first"]]
        columns = {key: np.array([s[key] for s in chosen]) for key in ("samples", "seconds", "idle", "exchange")}
        summary[phase] = {key: np.median(values, axis=0).tolist() for key, values in columns.items()} | {
            "mean_idle": columns["idle"].mean(axis=0).tolist(),
            "samples_per_second": columns["samples"].sum() / columns["seconds"].sum(),
            "steps": len(chosen),
        }
    return summary


def table(variants: dict[str, dict]) -> str:
    lines = [
        "| | | samples of a step | seconds | idle, process 0 | idle, process 1 | samples per second |",
        "| :-- | :-- | --: | --: | --: | --: | --: |",
    ]
    for phase in PHASES:
        for name, summary in variants.items():
            s = summary[phase]
            samples = " + ".join(f"{n:.0f}" for n in s["samples"])
            idle = " | ".join(f"{share:.1%}" for share in s["idle"])
            lines.append(
                f"| {phase} | {name} | {samples} | {s['seconds']:.2f} | {idle} | {s['samples_per_second']:.1f} |"
            )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--image-size", type=int, default=80)
    parser.add_argument("--candidates", type=int, default=60, help="of each process in a step")
    parser.add_argument("--size", type=int, default=12, help="most samples of a micro-batch")
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--interval", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn")
    parser.add_argument("--turns", type=int, default=4, help="turns of each variant in a phase")
    parser.add_argument("--settled", type=int, default=16, help="step of a phase from which its figures are taken")
    parser.add_argument("--out", type=Path, help="file for the figures, JSON")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {int(os.environ["LOCAL_RANK"]) % os.cpu_count()})
    dist.init_process_group("gloo")
    mine = measure(args)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        steps = {name: join([traces[name] for traces in everyone]) for name in mine}
        variants = {name: summarize(trace, args.settled) for name, trace in steps.items()}
        print(table(variants))
        if args.out:
            settings = {name: value for name, value in vars(args).items() if name != "out"}
            args.out.write_text(json.dumps({"settings": settings, "summary": variants, "trace": steps}) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
