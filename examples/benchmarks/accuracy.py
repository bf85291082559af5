"""Accuracy at a share of the compute: policies side by side with plain fine-tuning and with plain training on less.

    python examples/benchmarks/accuracy.py --assets ASSETS --task cifar10 --train 4000 --test 2000 --steps 200 \
        --rows plain fewer_steps fewer_samples importance --budgets 0.6 0.4 --seeds 0 1 2 --json results.jsonl

A row is ``plain`` (all of the compute), ``fewer_steps`` (plain, that share of the steps, with a learning-rate schedule
of its own) or a policy, with fields of `D2FTConfig` where wanted: ``importance:backward_score=el2n``; ``importance*``
runs as many steps as make its compute the plain run's. ``averaged=0.25`` evaluates the mean of the weights over that
last share of the steps. The result file
gets one line a run; runs that it already holds are not made again, so a command can be continued.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from rows import append_rows, command_line, read_rows
from tasks import Task, draw_labels, load_task
from transformers import TrainingArguments, set_seed

from d2ft_peft import AveragedWeightsCallback, D2FTConfig, D2FTPlanner, D2FTTrainer
from d2ft_peft.training.data import TrainingData


OF_THE_RUN = ("lr", "steps", "averaged")
"""Fields of a row that say how it is trained, and are none of `D2FTConfig`."""


def parse(row: str) -> tuple[str, dict]:
    """Name of a row, and the fields that it sets."""
    name, _, fields = row.partition(":")
    pairs = (pair.split("=") for pair in re.split(r",(?![^(]*\))", fields)) if fields else ()
    return name, {key: _literal(value) for key, value in pairs}


def config_of(row: str, budget: float, mode: str, task: Task, seed: int) -> D2FTConfig:
    """The configuration that a row stands for; ``default`` is what a user gets who names no policy."""
    name, options = parse(row)
    name = name.removesuffix("*")
    options = {field: value for field, value in options.items() if field not in OF_THE_RUN}
    if name in ("plain", "fewer_steps"):
        name, options = "all_full", {"compute_budget": 1.0} | options
    elif not {"num_full", "compute_budget"} & set(options):
        options["compute_budget"] = budget
    if name != "default":
        options["policy"] = name
    return D2FTConfig(seed=seed, **variant(mode, task), **options)


def variant(mode: str, task: Task) -> dict:
    """Fields for full fine-tuning of all weights, or for LoRA with the new head beside it."""
    if mode == "full":
        return {"train_boundary": True}
    return {"r": 8, "lora_alpha": 16, "modules_to_save": [task.head] if task.head else None}


def _literal(value: str):
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def learning_rate(row: str, mode: str, task: Task, default: float | None) -> float:
    return parse(row)[1].get("lr") or default or task.learning_rate[mode]


class Stopwatch:
    """Processor seconds within some methods of a class while it is entered, the time of one within another once."""

    def __init__(self, owner: type, *methods: str):
        self.seconds, self._running, self._owner = 0.0, False, owner
        self._methods = {name: getattr(owner, name) for name in methods}

    def __enter__(self) -> Stopwatch:
        for name, method in self._methods.items():
            setattr(self._owner, name, self._timed(method))
        return self

    def __exit__(self, *error: object) -> None:
        for name, method in self._methods.items():
            setattr(self._owner, name, method)

    def _timed(self, method: Callable) -> Callable:
        def timed(*args, **kwargs):
            if self._running:
                return method(*args, **kwargs)
            self._running, started = True, time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - started
                self._running = False

        return timed


class PlainEvaluation:
    """A Trainer whose training batches are augmented, and no others; mix it in before the Trainer."""

    task: Task

    def get_eval_dataloader(self, eval_dataset=None):
        self.data_collator, collator = self.task.collate, self.data_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def measure(self) -> float:
        """The task's metric; a loss is the mean over all tokens that have a label, however batches share them."""
        if self.task.metric == "accuracy":
            self.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
            self.compute_metrics = lambda found: {"metric": 100 * np.mean(found.predictions == found.label_ids)}
        else:
            self.preprocess_logits_for_metrics = _losses_and_tokens
            self.compute_metrics = lambda found: {"metric": np.divide(*found.predictions.sum(0, dtype=np.float64))}
        return float(self.evaluate()["eval_metric"])


class Evaluator(PlainEvaluation, D2FTTrainer):
    """D2FT's Trainer, evaluated on plain batches."""


def _losses_and_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the losses of each sequence, and how many tokens it is over, [n, 2]."""
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return torch.stack([losses.sum(1), (labels[:, 1:] != -100).sum(1)], dim=1)


def training_arguments(folder: str, steps: int, lr: float, warmup: int, seed: int, args: argparse.Namespace):
    """Arguments of a run that neither saves nor reports anything."""
    return TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=args.micro_batch_size, learning_rate=lr,
        gradient_accumulation_steps=args.micro_batches, per_device_eval_batch_size=100, warmup_steps=warmup,
        weight_decay=args.weight_decay, save_strategy="no", report_to=[], seed=seed, disable_tqdm=True,
        logging_steps=10**9, remove_unused_columns=False, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip


def train(task: Task, row: str, budget: float, seed: int, args: argparse.Namespace) -> dict:
    """One run: its setting, what it reached, and what it cost."""
    set_seed(seed)
    torch.set_num_threads(args.threads)
    lr = learning_rate(row, args.mode, task, args.lr)
    steps = args.steps
    if row.startswith("fewer_steps"):
        steps = max(1, round(args.steps * budget))
    elif parse(row)[0].endswith("*"):
        steps = round(args.steps / budget)
    share = parse(row)[1].get("averaged")
    model = get_peft_model(task.model(), config_of(row, budget, args.mode, task, seed))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Evaluator(
            model=model, args=training_arguments(folder, steps, lr, args.warmup, seed, args),
            train_dataset=task.train, eval_dataset=task.test,
            data_collator=lambda samples: task.collate(samples, flip=True),
            callbacks=[AveragedWeightsCallback(share)] if share else None,
        )  # fmt: skip
        trainer.task = task
        methods = ("prepare", "plan_facts", "compose", "observe")
        with Stopwatch(TrainingData, "score_once") as scoring, Stopwatch(D2FTPlanner, *methods) as planning:
            started, cpu = time.perf_counter(), time.process_time()
            trainer.train()
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        result = trainer.measure()
    log = next(entry for entry in reversed(trainer.state.log_history) if "compute_ratio" in entry)
    return {
        "task": args.task, "mode": args.mode, "row": row, "budget": 1.0 if row.startswith("plain") else budget,
        "seed": seed, "steps": args.steps, "lr": lr, "train_samples": len(task.train), "metric": task.metric,
        "value": result, "seconds": seconds, "cpu_seconds": cpu_seconds, "scoring_seconds": scoring.seconds,
        "planning_seconds": planning.seconds, "compute_ratio": log["compute_ratio"],
        "flops": trainer.state.total_flos, "size": args.size, "label_noise": args.label_noise,
        "micro_batches": args.micro_batches, "micro_batch_size": args.micro_batch_size,
    }  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--assets", required=True, help="folder with models/ and data/")
    parser.add_argument("--task", required=True)
    parser.add_argument("--mode", choices=["full", "lora"], default="full")
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.6])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--micro-batches", type=int, default=5)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=None, help="for all rows; else the task's, or a row's own lr=...")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--train", type=int, default=None, help="training samples, all by default")
    parser.add_argument("--test", type=int, default=None)
    parser.add_argument("--size", type=int, default=96, help="pixels of an image's side, tokens of a block of text")
    parser.add_argument("--label-noise", type=float, default=0.0, help="share of training images with a random label")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", required=True, help="file that gets one line a run")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    warnings.filterwarnings("ignore")
    task = load_task(args.task, args.assets, args.size, args.train, args.test)
    if args.label_noise:
        draw_labels(task, args.label_noise)
    path = Path(args.json)
    done = list(read_rows(path))
    keys = ("task", "mode", "row", "budget", "seed", "steps", "lr", "train_samples", "size", "label_noise")
    known = {tuple(run.get(key, 0.0) for key in keys) for run in done}
    for seed in args.seeds:
        for row in args.rows:
            for budget in [1.0] if row.startswith("plain") else args.budgets:
                lr = learning_rate(row, args.mode, task, args.lr)
                setting = (args.task, args.mode, row, budget, seed, args.steps, lr, len(task.train), args.size)
                if (*setting, args.label_noise) in known:
                    continue
                run = train(task, row, budget, seed, args)
                append_rows(path, [run])
                print(
                    f"{args.task} {args.mode} {row:40} {run['budget']:.2f} seed {seed} lr {lr:g}: "
                    f"{run['value']:.3f} ({run['seconds']:.0f} s, ran {run['compute_ratio']:.3f})",
                    flush=True,
                )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
