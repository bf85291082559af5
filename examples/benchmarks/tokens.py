"""Fewer tokens in the middle blocks: at which length does it begin to pay, in time and in accuracy?

    python examples/benchmarks/tokens.py time --json tokens.jsonl
    python examples/benchmarks/tokens.py accuracy --assets ASSETS --size 128 --low 96 --seeds 0 1 --json tokens.jsonl

``time`` takes a training step of a model with random weights at a share of the FLOPs and a plain one in turns, so that
a busy machine slows both; the ratio is the median over the repeats, of processor seconds.

``accuracy`` fine-tunes ViT-Tiny on CIFAR-10: plain, and at one share of its compute by fewer samples, by lower
resolution (the last steps at full resolution, as many as the budget has room for), and by fewer tokens, chosen in
several ways. All test at full resolution, with every token. Rows that the file already holds are not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from accuracy import train
from peft import get_peft_model
from rows import append_rows, command_line, read_rows
from step_time import build_model, make_batch
from tasks import Task, load_task

from d2ft_peft import D2FTConfig, D2FTPlanner


SHAPES = {
    "ViT, 65 tokens": {"model": "vit", "image_size": 128, "micro_batch_size": 8},
    "ViT, 197 tokens": {"model": "vit", "image_size": 224, "micro_batch_size": 4},
    "BERT, 128 tokens": {"model": "bert", "length": 128, "micro_batch_size": 4},
    "BERT, 512 tokens": {"model": "bert", "length": 512, "micro_batch_size": 1},
    "BERT, 2048 tokens": {"model": "bert", "length": 2048, "micro_batch_size": 1},
    "Llama, 128 tokens": {"model": "llama", "length": 128, "micro_batch_size": 4},
    "Llama, 512 tokens": {"model": "llama", "length": 512, "micro_batch_size": 1},
    "Llama, 2048 tokens": {"model": "llama", "length": 2048, "micro_batch_size": 1},
}
"""What is timed: 12 blocks (ViT) or 6, of width 192 with 3 heads."""

LOWER = "lower_resolution"


def time_shape(name: str, args: argparse.Namespace) -> list[dict]:
    """Ratio of a step on fewer tokens to a plain one, for each choice."""
    shape = argparse.Namespace(
        hidden=192, heads=3, kv_heads=None, intermediate=None, vocabulary=1024, **SHAPES[name], 
        layers=12 if SHAPES[name]["model"] == "vit" else 6,
    )  # fmt: skip
    batch = make_batch(shape, torch.device("cpu"))
    planners = {}
    choices = ["plain", *(c for c in args.choices if shape.model == "vit" or c != "variance")]
    if shape.model == "llama":
        choices = [choice for choice in choices if choice != "attention"]
    for choice in choices:
        fields = {"policy": "all_full", "compute_budget": 1.0}
        if choice != "plain":
            fields = {"policy": "fewer_tokens", "compute_budget": args.budget, "token_choice": choice}
            fields["token_dense_share"] = 0.0
        model = get_peft_model(
            build_model(shape), D2FTConfig(train_boundary=True, skip_unread_rows=False, **fields)
        ).train()
        planners[choice] = D2FTPlanner(model, num_micro_batches=1)
    seconds: dict[str, list[float]] = {choice: [] for choice in planners}
    for repeat in range(args.repeats + 1):
        order = list(planners)
        for choice in order[repeat % len(order) :] + order[: repeat % len(order)]:
            seconds[choice].append(_step(planners[choice], batch))
    rows = []
    for choice, planner in planners.items():
        ratios = [ours / plain for ours, plain in zip(seconds[choice][1:], seconds["plain"][1:], strict=True)]
        rows.append({
            "kind": "time", "shape": name, "choice": choice, "budget": args.budget, "repeats": args.repeats,
            "time_ratio": statistics.median(ratios), "flops_ratio": planner.pop_logs()["flops_ratio"],
            "kept": planner.runtime.passes[0][1:], "seconds": statistics.median(seconds[choice][1:]),
        })  # fmt: skip
    return rows


def _step(planner: D2FTPlanner, batch: dict[str, Any]) -> float:
    """Processor seconds of forward and backward pass; gradients exist already, but in the first step."""
    planner.plan([batch])
    started = time.process_time()
    with planner.micro_batch(0):
        planner.model(**batch).loss.backward()
    return time.process_time() - started


class LowerResolution:
    """Collates training images at a lower resolution, and those of the last steps at the full one.

    Args:
        task: The task at full resolution.
        size: Side of the smaller images.
        batches: How many batches are collated in a lower resolution.
    """

    def __init__(self, task: Task, size: int, batches: int):
        self.task, self.size, self.left = task, size, batches

    def __call__(self, samples: list, flip: bool = False) -> dict[str, Any]:
        batch = self.task.collate(samples, flip)
        if flip and self.left > 0:
            self.left -= 1
            batch["pixel_values"] = torch.nn.functional.interpolate(
                batch["pixel_values"], size=self.size, mode="bicubic", antialias=True
            )
        return batch


def low_batches(task: Task, args: argparse.Namespace) -> int:
    """How many batches of a run have to be small so that its compute is the budget."""
    base = task.model()
    full, low = ((side // base.config.patch_size) ** 2 + 1 for side in (args.size, args.low))
    planner = D2FTPlanner(get_peft_model(base, D2FTConfig(policy="all_full", train_boundary=True)))
    planner.prepare(task.collate(task.train[:1]))
    share = planner.costs.full_flops([(1, low)]) / planner.costs.full_flops([(1, full)])
    return round(min(1.0, (1 - args.budget) / (1 - share)) * args.steps * args.micro_batches)


def accuracy_row(task: Task, row: str, seed: int, args: argparse.Namespace) -> dict:
    """One run."""
    if row != LOWER:
        return train(task, alone(row), args.budget, seed, args) | {"row": row}
    collate = LowerResolution(task, args.low, low_batches(task, args))
    return train(dataclasses.replace(task, collate=collate), alone("plain"), args.budget, seed, args) | {
        "row": f"{LOWER}:{args.low}", "budget": args.budget,
    }  # fmt: skip


def alone(row: str) -> str:
    """The row without what else saves compute, or helps: tokens are what is compared."""
    return f"{row}{',' if ':' in row else ':'}skip_unread_rows=False,head_start=False"


def run_accuracy(args: argparse.Namespace) -> None:
    """All rows, seed by seed."""
    task = load_task(args.task, args.assets, args.size, args.train, args.test)
    keys = ("row", "seed", "steps", "lr", "size", "train_samples", "micro_batch_size")
    known = {tuple(row.get(key) for key in keys) for row in read_rows(args.json)}
    for seed in args.seeds:
        for row in args.rows:
            name = f"{LOWER}:{args.low}" if row == LOWER else row
            setting = (name, seed, args.steps, args.lr or task.learning_rate[args.mode], args.size, len(task.train))
            if (*setting, args.micro_batch_size) in known:
                continue
            run = {"kind": "accuracy", **accuracy_row(task, row, seed, args)}
            append_rows(args.json, [run])
            print(
                f"{args.size} px {name:40} seed {seed}: {run['value']:.2f} ({run['flops'] / 1e12:.2f} TFLOPs, "
                f"{run['cpu_seconds']:.0f} s)", flush=True,
            )  # fmt: skip


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("what", choices=["time", "accuracy"])
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--choices", nargs="+", default=["random_per_block", "grid", "variance", "attention"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--assets")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--low", type=int, default=96, help="side of the images of lower resolution")
    choices = [f"fewer_tokens:token_choice={choice}" for choice in ("random", "random_per_block", "grid", "variance")]
    parser.add_argument("--rows", nargs="+", default=["plain", "fewer_samples", LOWER, *choices])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--micro-batches", type=int, default=5)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--lr", type=float, default=None)
    args = parser.parse_args(argv)
    return argparse.Namespace(
        **vars(args), task="cifar10", mode="full", warmup=6, weight_decay=0.01, label_noise=0.0
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    if args.what == "accuracy":
        run_accuracy(args)
        return
    for name in args.shapes:
        rows = time_shape(name, args)
        append_rows(args.json, rows)
        for row in rows:
            print(
                f"{name:18} {row['choice']:10} {row['kept']} time {row['time_ratio']:.3f} "
                f"flops {row['flops_ratio']:.3f}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
