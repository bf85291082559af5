"""Kill-and-Revive beside simpler ways to train few modules: accuracy or loss, FLOPs and seconds.

    python examples/benchmarks/kill_revive.py --assets ASSETS --task shakespeare
    python examples/benchmarks/kill_revive.py --table

A run is a method of PEFT, a way to choose modules, a share of them and a seed. Ways: ``all`` modules; Kill-and-Revive
with each kind of idle module (``probe``, ``last``, ``random``; ``+warmup``: all modules train in a first interval); its
baselines ``fixed`` and ``redrawn`` at random and ``top`` (all modules in the first interval, then those that changed
most); ``low_rank`` (all modules at that share of the rank), ``fewer_steps`` (all modules on that share of the steps),
``none`` (the head alone). ``:field=value`` behind a way sets other fields of the rule, or ``lr`` as a multiple of the
task's. The result file gets one line a run; runs that it already holds are not made again.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import peft
import torch
from rows import append_rows, command_line, read_rows
from tasks import Task, load_task
from transformers import get_linear_schedule_with_warmup, set_seed

from d2ft_peft import D2FTConfig, partition_model
from d2ft_peft.costs import flop_counter
from d2ft_peft.dlora import KillRevive
from d2ft_peft.report import format_table, plot_activity


RESULTS = Path(__file__).parent / "results" / "kill_revive"
SHARES = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
WAYS = [
    "probe", "last", "random", "probe+warmup", "random+warmup", "redrawn", "fixed", "top", "low_rank", "fewer_steps",
]  # fmt: skip
RANK, INTERVALS, WARMUP = 8, 15, 10


@dataclass(frozen=True)
class Setting:
    """What a task is trained with."""

    steps: int
    batch_size: int
    size: int
    train: int | None
    test: int | None


SETTINGS = {
    "shakespeare": Setting(steps=250, batch_size=16, size=64, train=None, test=400),
    "sst2": Setting(steps=250, batch_size=8, size=96, train=8000, test=1000),
    "cifar10": Setting(steps=200, batch_size=16, size=64, train=4000, test=1000),
}
METHODS = {
    "lora": (peft.LoraConfig, {"r": RANK, "lora_alpha": 2 * RANK}, 1),
    "ia3": (peft.IA3Config, {"feedforward_modules": []}, 5),
    "loha": (peft.LoHaConfig, {"r": RANK, "alpha": 2 * RANK}, 1),
    "lokr": (peft.LoKrConfig, {"r": RANK, "alpha": 2 * RANK}, 1),
    "oft": (peft.OFTConfig, {"oft_block_size": 8, "use_cayley_neumann": False}, 1),
    "vera": (peft.VeraConfig, {"r": 64}, 5),
    "d2ft": (D2FTConfig, {"r": RANK, "lora_alpha": 2 * RANK, "policy": "all_full"}, 1),
}
"""Configuration, its arguments, and the learning rate as a multiple of LoRA's."""


def plan(methods: list[str], seeds: list[int]) -> list[tuple[str, str, float, int]]:
    """Runs of a task: method, way, share, seed. One seed has to do but for LoRA with all of the modules and 1/8."""
    runs = []
    for seed in seeds:
        if "lora" in methods:
            runs += [("lora", "all", 1.0, seed)] + [("lora", way, 1 / 8, seed) for way in WAYS]
        if seed == 0:
            if "lora" in methods:
                runs += [("lora", "random+warmup", share, 0) for share in SHARES if share != 1 / 8]
                runs += [("lora", "none", 0.0, 0)]
            others = [name for name in methods if name != "lora"]
            runs += [(name, *row, 0) for name in others for row in (("all", 1.0), ("random+warmup", 1 / 8))]
    return runs


def adapt(task: Task, method: str, way: str, share: float) -> torch.nn.Module:
    """The pre-trained model with a method's modules on all projections."""
    base = task.model()
    config, arguments, _ = METHODS[method]
    head = [task.head] if task.head else None
    if way == "low_rank":
        arguments = {"r": max(1, round(RANK * share)), "lora_alpha": 2 * max(1, round(RANK * share))}
    if method != "d2ft":
        arguments = {**arguments, "target_modules": list(partition_model(base).projections)}
    return peft.get_peft_model(base, config(**arguments, modules_to_save=head))


def parse(way: str) -> tuple[str, dict]:
    """Name of a way, and the fields that it sets."""
    name, _, fields = way.partition(":")
    pairs = [pair.split("=") for pair in fields.split(",")] if fields else []
    return name, {key: json.loads(value) if value[0].isdigit() else value for key, value in pairs}


def rule_of(way: str, share: float, modules: int, steps: int, seed: int) -> dict:
    """Arguments of `KillRevive` that a way stands for."""
    name, options = parse(way)
    name, _, warmup = name.partition("+")
    choice = {"idle": name} if name in ("probe", "last", "random") else {"choose": name}
    options = {"interval": max(1, steps // INTERVALS), **options}
    options.setdefault("warmup", options["interval"] if warmup else 0)
    options.pop("lr", None)
    return {"active": max(1, int(share * modules)), "seed": seed, **choice, **options}


def run(task: Task, name: str, method: str, way: str, share: float, seed: int, picture: str | None = None) -> dict:
    """One run: its setting, what it reached, and what it cost; and a picture of which modules were active."""
    setting = SETTINGS[name]
    set_seed(seed)
    model = adapt(task, method, way, share)
    parameters = [p for p in model.parameters() if p.requires_grad]
    lr = task.learning_rate["lora"] * METHODS[method][2] * parse(way)[1].get("lr", 1)
    steps = max(1, round(setting.steps * share)) if way == "fewer_steps" else setting.steps
    steps = 0 if way == "none" and task.head is None else steps
    kill_revive = None
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, min(WARMUP, steps // 4), steps)
    if way == "none":
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "modules_to_save" in parameter_name)
    elif parse(way)[0] not in ("all", "low_rank", "fewer_steps"):
        modules = len(partition_model(model.get_base_model()).projections)
        kill_revive = KillRevive(model, optimizer, **rule_of(way, share, modules, steps, seed))
    order = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    model.train()
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        if len(queue) < setting.batch_size:
            queue = torch.randperm(len(task.train), generator=order).tolist()
        chosen, queue = queue[: setting.batch_size], queue[setting.batch_size :]
        model(**task.collate([task.train[i] for i in chosen], flip=True)).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if kill_revive is not None:
            kill_revive.step()
        optimizer.zero_grad()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    modules = {"none": 0.0, "fewer_steps": share}.get(way, 1.0)
    if kill_revive is not None:
        activity, began = kill_revive.activity
        modules = float(activity.mean(axis=1) @ np.diff([*began, steps])) / steps
        if picture:
            plot_activity(activity, kill_revive.names, picture, began)
    flops = count(model, task, kill_revive, steps)
    return {
        "task": name, "method": method, "way": way, "share": share, "seed": seed, "lr": lr, "steps": steps,
        "metric": task.metric, "value": evaluate(model, task),
        "modules": modules, "flops": flops, "seconds": seconds, "cpu_seconds": cpu,
    }  # fmt: skip


def count(model: torch.nn.Module, task: Task, kill_revive: KillRevive | None, steps: int) -> float:
    """FLOPs of the forward and backward passes of a run, a sample in each step.

    Counted afterwards on the same two samples for what trained in each interval; a step with a probe counts as one in
    which all modules train.
    """
    torch.manual_seed(0)
    batch = task.collate(task.train[:2])

    def once() -> float:
        with flop_counter() as counter:
            loss = model(**batch).loss
            if loss.requires_grad:
                loss.backward()
        model.zero_grad()
        return counter.get_total_flops() / 2

    if kill_revive is None or steps == 0:
        return once() * steps
    activity, began = kill_revive.activity
    modules, rule = kill_revive._modules, kill_revive.rule
    kill_revive.close()
    everything = once()
    total, known = 0.0, {}
    for row, start, end in zip(activity, began, [*began[1:], steps], strict=True):
        key = row.tobytes()
        if key not in known:
            for module, active in zip(modules, row, strict=True):
                for parameter in module.parameters:
                    parameter.requires_grad_(bool(active))
            known[key] = once()
        probes = rule.probes and end < steps
        total += known[key] * (end - start - probes) + everything * probes
    return total


@torch.no_grad()
def evaluate(model: torch.nn.Module, task: Task) -> float:
    """Accuracy in per cent, or mean loss."""
    model.eval()
    found, test = [], task.test
    if isinstance(test[0], dict):  # text: little padding
        test = sorted(test, key=lambda sample: len(sample["input_ids"]))
    for start in range(0, len(test), 100):
        batch = task.collate(test[start : start + 100])
        outputs = model(**batch)
        if task.metric == "loss":
            found += [float(outputs.loss)] * len(batch["labels"])
        else:
            found += (100.0 * (outputs.logits.argmax(-1) == batch["labels"])).tolist()
    return mean(found)


def tables(rows: list[dict]) -> str:
    """A table for each task: means over seeds, FLOPs and processor time as shares of training all modules."""
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        lines = []
        for key in dict.fromkeys((row["method"], row["way"], row["share"]) for row in of_task):
            runs = [row for row in of_task if (row["method"], row["way"], row["share"]) == key]
            seeds = {run["seed"] for run in runs}
            whole = [r for r in of_task if (r["method"], r["way"]) == (key[0], "all") and r["seed"] in seeds]
            values = [run["value"] for run in sorted(runs, key=lambda run: run["seed"])]
            line = {"method": key[0], "way": key[1], "share": f"1/{round(1 / key[2])}" if key[2] else "0"}
            line[runs[0]["metric"]] = f"{mean(values):.3f}" if runs[0]["metric"] == "loss" else f"{mean(values):.2f}"
            line["seeds"] = ", ".join(f"{value:.3f}" if value < 20 else f"{value:.2f}" for value in values)
            line["modules"] = f"{mean(run['modules'] for run in runs):.3f}"
            if whole:
                for name, field in (("FLOPs", "flops"), ("time", "cpu_seconds")):
                    line[name] = f"{mean(r[field] for r in runs) / mean(r[field] for r in whole):.3f}"
            lines.append(line)
        parts.append(f"{task}\n\n{format_table(lines)}")
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--assets", help="folder with models/ and data/")
    parser.add_argument("--task", choices=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--ways", nargs="+", default=None, help="runs of LoRA with these ways, instead of all runs")
    parser.add_argument("--shares", nargs="+", type=float, default=[1 / 8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", default=str(RESULTS), help="folder of the result files")
    parser.add_argument("--picture", help="file that shows which modules were active in the last run")
    parser.add_argument("--table", action="store_true", help="show what the result files hold")
    args = parser.parse_args(argv)
    folder = Path(args.results)
    if args.table:
        print(tables(list(read_rows(*(folder / f"{task}.jsonl" for task in SETTINGS)))))
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{args.task}.jsonl"
    known = {(row["method"], row["way"], row["share"], row["seed"]) for row in read_rows(path)}
    setting = SETTINGS[args.task]
    task = load_task(args.task, args.assets, setting.size, setting.train, setting.test)
    if args.ways is None:
        runs = plan(args.methods, args.seeds)
    else:
        shares = {"all": [1.0], "none": [0.0]}
        runs = [("lora", w, h, s) for s in args.seeds for w in args.ways for h in shares.get(w, args.shares)]
    for key in runs:
        if key not in known:
            row = run(task, args.task, *key, picture=args.picture)
            append_rows(path, [row])
            print(f"{args.task} {key}: {row['value']:.3f} ({row['seconds']:.0f} s)", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
