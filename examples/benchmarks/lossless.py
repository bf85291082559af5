"""As good as the full run, in less time? Rows beside plain fine-tuning, as the stock Trainer runs it.

    python examples/benchmarks/lossless.py --assets ASSETS --json rates.jsonl --rows plain default fewer_steps --tune
    python examples/benchmarks/lossless.py --assets ASSETS --json rows.jsonl --rows plain default fewer_steps \
        --rates rates.jsonl --seeds 0 1 2
    python examples/benchmarks/lossless.py --assets ASSETS --json rows.jsonl --rows plain default fewer_steps --time

A row is ``plain``, which is `transformers.Trainer` on the plain model (full) or PEFT's LoRA, without D2FT; ``default``,
which is ``D2FTConfig(compute_budget=budget)``; or a policy. Fields follow, as in ``fewer_samples:head_start=True``:
those of `D2FTConfig` (of `LoraConfig` for ``plain`` under LoRA; with any others ``plain`` is the policy ``all_full``),
``lr``, ``steps`` (a factor), and ``averaged=True`` (weights are averaged over the last quarter of the steps).
``compute_budget=0.55`` in a row sets what the budget of that name would have set: for equal time.

``--tune`` tries rates on samples of the training set that no other run uses. ``--time`` lets short runs of the rows
take turns, on a share of the steps and of the samples, so that passes over the data keep their weight. Seconds are the
processor's, within ``trainer.train()``. Files get one line a run; what they already hold is not made again.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import transformers
from accuracy import OF_THE_RUN, Evaluator, config_of, parse, training_arguments, variant
from accuracy_table import at_best_rate
from peft import LoraConfig, get_peft_model
from rows import append_rows, command_line, read_rows
from stock_trainer import StockTrainer, figures
from tasks import Task, load_task

from d2ft_peft import AveragedWeightsCallback
from d2ft_peft.partition import partition_model


@dataclass(frozen=True)
class Setting:
    """Samples to train, validate and test on, optimizer steps of the plain run, and pixels or tokens of a sample."""

    train: int
    validation: int
    test: int
    steps: int
    size: int = 96
    micro_batch_size: int = 16


SETTINGS = {
    "cifar10": Setting(2000, 1000, 2000, 125, size=64),
    "stanford_cars": Setting(4800, 1000, 1568, 120, size=64),
    "sst2": Setting(800, 1000, 2000, 30),
    "mrpc": Setting(400, 1000, 1500, 30, micro_batch_size=8),
    "ag_news": Setting(320, 1000, 1000, 24, micro_batch_size=8),
    "ag_news_long": Setting(200, 300, 500, 20, micro_batch_size=4),
    "shakespeare": Setting(2000, 400, 400, 75, size=128),
    "gsm8k_answers": Setting(700, 400, 1000, 70, size=384, micro_batch_size=4),
}
"""Plain runs of one to two minutes on one core: what is wanted is the difference of rows, on several seeds."""
MICRO_BATCHES = 5
TUNING_SEED = 100
GRID = (1 / 3, 1.0, 3.0)


@dataclass(frozen=True)
class Run:
    """What is run; a file holds each once.

    Attributes:
        split: ``"test"``, ``"validation"`` (to find rates) or ``"time"`` (no evaluation; the seed is the round).
        share: Of the setting's steps and training samples.
    """

    task: str
    mode: str
    row: str
    budget: float
    seed: int
    lr: float
    split: str
    share: float
    steps: int

    @property
    def own_steps(self) -> int:
        """Optimizer steps of the row itself."""
        factor = self.budget if parse(self.row)[0] == "fewer_steps" else parse(self.row)[1].get("steps", 1)
        return max(1, round(self.steps * self.share * factor))

    @property
    def peft_options(self) -> dict[str, Any] | None:
        """What the row sets of PEFT's configuration, if it does without D2FT; else None."""
        name, options = parse(self.row)
        options = {field: value for field, value in options.items() if field not in OF_THE_RUN}
        theirs = {field.name for field in fields(LoraConfig)} if self.mode == "lora" else set()
        return options if name == "plain" and set(options) <= theirs else None


def build(run: Run, task: Task) -> torch.nn.Module:
    """The model of a row, ready to be trained."""
    model, options = task.model(), run.peft_options
    if options is None:
        return get_peft_model(model, config_of(run.row, run.budget, run.mode, task, run.seed))
    if run.mode == "full":
        return model
    targets = [p.name for branch in partition_model(model).branches for p in branch.projections]
    return get_peft_model(model, LoraConfig(**variant("lora", task) | {"target_modules": targets} | options))


def train(run: Run, task: Task, args: argparse.Namespace) -> dict:
    """One run: what it reached, and what it cost."""
    transformers.set_seed(run.seed)
    torch.set_num_threads(1)
    before = time.process_time()
    model, kind = build(run, task), Evaluator if run.peft_options is None else StockTrainer
    setup = time.process_time() - before
    with tempfile.TemporaryDirectory() as folder:
        trainer = kind(
            model=model, args=training_arguments(folder, run.own_steps, run.lr, run.own_steps // 10, run.seed, args),
            train_dataset=task.train, eval_dataset=task.test,
            data_collator=lambda samples: task.collate(samples, flip=True),
            callbacks=[AveragedWeightsCallback()] if parse(run.row)[1].get("averaged") else None,
        )  # fmt: skip
        trainer.task = task
        trainer.remove_callback(transformers.PrinterCallback)
        started, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        value = None if run.split == "time" else trainer.measure()
    return asdict(run) | {
        "train_samples": len(task.train), "test_samples": len(task.test), "metric": task.metric, "value": value,
        "seconds": seconds, "cpu_seconds": cpu_seconds, "setup_cpu_seconds": setup,
        **figures(trainer),
    }  # fmt: skip


def prepare(name: str, assets: str, split: str, share: float) -> Task:
    """A task on a share of its training samples; validation samples were never among them."""
    setting = SETTINGS[name]
    task = load_task(name, assets, setting.size, setting.train + setting.validation, setting.test)
    if len(task.train) <= setting.train:
        raise ValueError(f"task={name!r} has {len(task.train)} samples to train and validate on; set fewer to train.")
    training, validation = task.train[: setting.train], task.train[setting.train :]
    test = validation if split == "validation" else task.test
    if isinstance(test[0], dict):  # little padding in evaluation, which is none of what is measured
        test = sorted(test, key=lambda sample: len(sample["input_ids"]))
    step = MICRO_BATCHES * setting.micro_batch_size  # short runs have no more rests of an epoch than whole ones
    return replace(task, train=training[: max(1, round(share * len(training) / step)) * step], test=test)


def rates_of(paths: list[str]) -> dict[tuple, float]:
    """The best rate on validation samples, by (task, mode, row, budget)."""
    tried: dict = {}
    for run in read_rows(*paths):
        if run["split"] == "validation":
            key = tuple(run[name] for name in ("task", "mode", "row", "budget"))
            tried.setdefault(key, {}).setdefault(run["lr"], {})[run["seed"]] = run
    for key, rates in tried.items():
        best = next(iter(at_best_rate(rates).values()))["lr"]
        if len(rates) > 1 and best in (min(rates), max(rates)):
            print(f"{key}: the best rate, {best:g}, is at an end of its grid; tune with a wider --grid.")
        tried[key] = best
    return tried


def cells(args: argparse.Namespace) -> list[tuple[str, float]]:
    """Rows with their budgets; what runs everything has one only, and times are relative to plain."""
    rows = ["plain", *(row for row in args.rows if row != "plain")] if args.time else args.rows
    whole = ("plain", "all_full")
    return [(row, budget) for row in rows for budget in ([1.0] if parse(row)[0] in whole else args.budgets)]


def runs(name: str, mode: str, usual: float, tuned: dict[tuple, float], args: argparse.Namespace) -> Iterator[Run]:
    """The runs of a task and mode, in the order in which they are made.

    Raises:
        ValueError: If rates are given and a row's is not among them.
    """

    def rates(row: str, budget: float) -> list[float]:
        if "lr" in parse(row)[1]:
            return [] if args.tune else [parse(row)[1]["lr"]]
        if args.tune:
            return [float(f"{usual * factor:.3g}") for factor in args.grid]
        if args.rates and (name, mode, row, budget) not in tuned:
            raise ValueError(f"row={row!r} has no rate at budget={budget:g} for {name}, {mode}; run with --tune first.")
        return [tuned.get((name, mode, row, budget), usual)]

    rounds = [r["seed"] for r in read_rows(args.json) if (r["task"], r["mode"], r["split"]) == (name, mode, "time")]
    first = 1 + max(rounds, default=-1)  # ratios are those of a round, so that a later call makes rounds of its own
    for seed in [TUNING_SEED] if args.tune else range(first, first + args.rounds) if args.time else args.seeds:
        turn = cells(args)
        start = seed % len(turn) if args.time else 0  # no row is always the first
        for row, budget in turn[start:] + turn[:start]:
            for lr in rates(row, budget):
                yield Run(name, mode, row, budget, seed, lr, args.split, args.share, SETTINGS[name].steps)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--assets", required=True, help="folder with models/ and data/")
    parser.add_argument("--json", required=True, help="file that gets one line a run")
    parser.add_argument("--tasks", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--modes", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.6])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    phase = parser.add_mutually_exclusive_group()
    phase.add_argument("--tune", action="store_true")
    phase.add_argument("--time", action="store_true")
    parser.add_argument("--grid", nargs="+", type=float, default=GRID, help="rates to try, relative to the task's")
    parser.add_argument("--rates", nargs="+", help="files that --tune wrote; else the task's rate is taken")
    parser.add_argument("--rounds", type=int, default=3, help="turns of --time")
    parser.add_argument("--share", type=float, default=None, help="of steps and samples; 0.2 for --time, else 1")
    parser.set_defaults(micro_batches=MICRO_BATCHES, weight_decay=0.01)
    args = parser.parse_args(argv)
    args.split = "validation" if args.tune else "time" if args.time else "test"
    args.share = args.share or (0.2 if args.time else 1.0)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    warnings.filterwarnings("ignore")
    tuned = rates_of(args.rates or [])
    keys = [field.name for field in fields(Run)]
    known = {tuple(row[key] for key in keys) for row in read_rows(args.json)}
    for name in args.tasks:
        task = prepare(name, args.assets, args.split, args.share)
        args.micro_batch_size = SETTINGS[name].micro_batch_size
        for run in [r for mode in args.modes for r in runs(name, mode, task.learning_rate[mode], tuned, args)]:
            if tuple(asdict(run).values()) in known:
                continue
            row = train(run, task, args)
            append_rows(args.json, [row])
            shown = f"{name} {run.mode} {run.row:40} {run.budget:.2f} {run.split} seed {run.seed} lr {run.lr:g}"
            print(f"{shown}: {row['value']} ({row['cpu_seconds']:.1f} s, {row['flops'] / 1e12:.3f} TFLOP)", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()
