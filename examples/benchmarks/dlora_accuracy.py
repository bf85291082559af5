"""What DLoRA's choices cost in loss, and what they save in bytes: a small pre-trained Llama on Shakespeare.

    python examples/benchmarks/dlora_accuracy.py --assets ASSETS --tune     # learning rates, on validation data
    python examples/benchmarks/dlora_accuracy.py --assets ASSETS            # three seeds of every row, on test data
    python examples/benchmarks/dlora_accuracy.py --png docs/images/dlora_accuracy.png    # tables and picture of them

All rows but those named ``local`` train over gRPC with a cloud in this process. Bytes are those that crossed in
training, frames included. Learning rates are the best of a grid on one seed and on text that is neither trained nor
tested on; a row with ``like`` shares that of a row that differs little. The adapter of seed 0 is saved, loaded by stock
PEFT into the whole model, and tested there as well. Runs that the result files hold are not made again.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rows import append_rows, command_line, pyplot, read_rows, save
from tasks import Task, load_task
from transformers import get_linear_schedule_with_warmup, set_seed

from d2ft_peft.dlora import BaseModel, Cloud, KillRevive, connect
from d2ft_peft.report import format_table


RESULTS = Path(__file__).parent / "results" / "dlora"
MODEL = "stories260k-llama"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DEPTH, LENGTH, BATCH, STEPS, WARMUP, INTERVALS = 5, 64, 8, 200, 10, 20
HELD_OUT, VALIDATION, TEST = 400, 200, 400
GRID = [3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2]


@dataclass(frozen=True)
class Row:
    """A way to train.

    Attributes:
        rank: Of the adapters.
        link: Options of `connect`; None trains without a cloud.
        like: The row whose learning rate it has; None: its own.
        share: Of the modules that are active, None without Kill-and-Revive.
        idle: See `KillReviveRule.idle`.
        blocks: Blocks with adapters; None: all.
    """

    rank: int = 8
    link: dict[str, Any] | None = field(default_factory=dict)
    like: str | None = None
    share: float | None = None
    idle: str = "last"
    blocks: tuple[int, ...] | None = None


ROWS = {
    "local LoRA, r = 8": Row(link=None),
    "cloud, r = 8": Row(like="local LoRA, r = 8"),
    "bf16": Row(link={"packing": "bf16"}, like="local LoRA, r = 8"),
    "int8": Row(link={"packing": "int8"}, like="local LoRA, r = 8"),
    "core, r = 8": Row(link={"crossing": "core"}),
    "core, r = 16": Row(16, {"crossing": "core"}),
    "core, r = 32": Row(32, {"crossing": "core"}),
    "core, r = 32, int8": Row(32, {"crossing": "core", "packing": "int8"}, like="core, r = 32"),
    "local LoRA, r = 2": Row(2, None),
    "local LoRA, r = 16": Row(16, None),
    "local LoRA, r = 32": Row(32, None),
    "1/8 active, cloud_copy": Row(link={"killed": "cloud_copy"}, like="1/8 active, exchange", share=1 / 8),
    "1/8 active, exchange": Row(link={"killed": "exchange"}, share=1 / 8),
    "1/8 active, drop": Row(link={"killed": "drop"}, like="1/8 active, exchange", share=1 / 8),
    "1/8 active, cloud_copy, probed": Row(
        link={"killed": "cloud_copy"}, like="1/8 active, exchange", share=1 / 8, idle="probe"
    ),
    "U-shaped, edge_blocks=(1, 1)": Row(
        link={"edge_blocks": (1, 1)}, like="U-shaped, edge_blocks=(2, 1)", blocks=(0, 4)
    ),
    "U-shaped, edge_blocks=(2, 1)": Row(link={"edge_blocks": (2, 1)}, blocks=(0, 1, 4)),
    "U-shaped, edge_blocks=(2, 1), int8": Row(
        link={"edge_blocks": (2, 1), "packing": "int8"}, like="U-shaped, edge_blocks=(2, 1)", blocks=(0, 1, 4)
    ),
    "noise 0.1": Row(link={"noise": 0.1}, like="local LoRA, r = 8"),
    "noise 0.3": Row(link={"noise": 0.3}, like="local LoRA, r = 8"),
    "noise 1": Row(link={"noise": 1.0}),
    "noise 3": Row(link={"noise": 3.0}, like="noise 1"),
    "noise 1, edge_blocks=(2, 0)": Row(link={"noise": 1.0, "edge_blocks": (2, 0)}, like="noise 1"),
    "noise 3, edge_blocks=(2, 0)": Row(link={"noise": 3.0, "edge_blocks": (2, 0)}, like="noise 1"),
}


def adapter(row: Row) -> LoraConfig:
    """LoRA on all projections, with a scale of 2 whatever the rank; of cores, 16 / r."""
    where = None if row.blocks is None else list(row.blocks)
    alpha = 16 if row.link and row.link.get("crossing") == "core" else 2 * row.rank
    return LoraConfig(r=row.rank, lora_alpha=alpha, target_modules=PROJECTIONS, layers_to_transform=where)


def train(model: torch.nn.Module, row: Row, task: Task, blocks: list, rate: float, seed: int, steps: int) -> None:
    """AdamW, linear decay, the batches of a seed in the same order in every row."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, min(WARMUP, steps // 4), steps)
    kill_revive = None
    if row.share is not None:
        modules = len(PROJECTIONS) * DEPTH
        kill_revive = KillRevive(
            model, optimizer, active=max(1, int(row.share * modules)), interval=max(1, steps // INTERVALS),
            idle=row.idle, seed=seed,
        )  # fmt: skip
    order = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    model.train()
    for _ in range(steps):
        if len(queue) < BATCH:
            queue = torch.randperm(len(blocks), generator=order).tolist()
        chosen, queue = queue[:BATCH], queue[BATCH:]
        model(**task.collate([blocks[i] for i in chosen])).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        optimizer.step()
        schedule.step()
        if kill_revive is not None:
            kill_revive.step()
        optimizer.zero_grad()
    if kill_revive is not None:
        kill_revive.close()


@torch.no_grad()
def evaluate(model: torch.nn.Module, task: Task, blocks: list) -> float:
    """Mean loss per token."""
    model.eval()
    parts = [blocks[start : start + 100] for start in range(0, len(blocks), 100)]
    return sum(float(model(**task.collate(part)).loss) * len(part) for part in parts) / len(blocks)


def run(
    name: str, rate: float, seed: int, task: Task, train_on: list, test_on: list, base: str, address: str, steps: int
) -> dict:
    """One run: what it reached on the edge, what its saved adapter reaches with stock PEFT, and what crossed."""
    row = ROWS[name]
    set_seed(seed)
    started = time.perf_counter()
    if row.link is None:
        model = get_peft_model(task.model(), adapter(row))
    else:
        model = connect(address, base, adapter(row), dtype=torch.float32, **row.link)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = {"row": name, "seed": seed, "lr": rate, "steps": steps, "parameters": parameters}
    if row.link is not None:
        traffic = model.remote_span.link.traffic
        before = traffic.sent, traffic.received
        found["bytes_once"] = sum(before)
    train(model, row, task, train_on, rate, seed, steps)
    if row.link is not None:
        tokens = steps * BATCH * LENGTH
        found |= {
            "sent_per_token": (traffic.sent - before[0]) / tokens,
            "received_per_token": (traffic.received - before[1]) / tokens,
        }
    found["loss"] = evaluate(model, task, test_on)
    if seed == 0:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found["loss_stock_peft"] = evaluate(PeftModel.from_pretrained(task.model(), folder), task, test_on)
    if row.link is not None:
        model.disconnect()
    return {**found, "seconds": time.perf_counter() - started}


def tuned(rows: list[dict], name: str) -> float:
    """The best learning rate of a row.

    Raises:
        ValueError: If it was not tuned.
    """
    of_row = [row for row in rows if row["row"] == (ROWS[name].like or name)]
    if not of_row:
        raise ValueError(f"row={name!r} has no learning rate yet; run with --tune first.")
    return min(of_row, key=lambda row: row["loss"])["lr"]


def tune(name: str, known: list[dict], try_rate: Any) -> None:
    """Try the middle of the grid and its neighbours, and go on where the best one lies at an end."""
    losses = {row["lr"]: row["loss"] for row in known if row["row"] == name}
    for rate in GRID[1:4]:
        if rate not in losses:
            losses[rate] = try_rate(rate)
    for end, beyond in ((GRID[1], GRID[0]), (GRID[3], GRID[4])):
        if min(losses, key=losses.get) == end and beyond not in losses:
            losses[beyond] = try_rate(beyond)


def tables(rows: list[dict], tuning: list[dict]) -> str:
    """Means over seeds."""
    lines = []
    for name in (name for name in ROWS if any(row["row"] == name for row in rows)):
        runs = sorted((row for row in rows if row["row"] == name), key=lambda row: row["seed"])
        line = {"row": name, "trained numbers": runs[0]["parameters"], "learning rate": f"{runs[0]['lr']:g}"}
        line |= {
            "test loss": f"{mean(r['loss'] for r in runs):.3f}",
            "seeds": ", ".join(f"{r['loss']:.3f}" for r in runs),
            "saved adapter, seed 0": f"{runs[0]['loss_stock_peft']:.3f}" if "loss_stock_peft" in runs[0] else None,
        }
        if "sent_per_token" in runs[0]:
            line |= {
                "sent / token": f"{mean(r['sent_per_token'] for r in runs):.0f}",
                "received / token": f"{mean(r['received_per_token'] for r in runs):.0f}",
                "both": round(mean(r["sent_per_token"] + r["received_per_token"] for r in runs)),
            }
        lines.append(line)
    rates = []
    for name in dict.fromkeys(row["row"] for row in tuning):
        found = {row["lr"]: row["loss"] for row in tuning if row["row"] == name}
        rates.append({"row": name, **{f"{rate:g}": f"{found[rate]:.3f}" for rate in GRID if rate in found}})
    parts = [format_table(lines)]
    if rates:
        columns = ["row", *(f"{rate:g}" for rate in GRID if any(f"{rate:g}" in line for line in rates))]
        parts += ["Validation loss by learning rate, seed 0:", format_table(rates, columns)]
    return "\n\n".join(parts)


def plot(rows: list[dict], path: str) -> None:
    """Test loss over bytes per token."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    kinds = {"noise": "C3", "core": "C0", "1/8": "C2", "U-": "C1"}
    for name in dict.fromkeys(row["row"] for row in rows if "sent_per_token" in row and "noise" not in row["row"]):
        runs = [row for row in rows if row["row"] == name]
        x = mean(r["sent_per_token"] + r["received_per_token"] for r in runs)
        y = mean(r["loss"] for r in runs)
        color = next((color for start, color in kinds.items() if name.startswith(start)), "k")
        axes.plot([x] * len(runs), [r["loss"] for r in runs], ".", color=color, alpha=0.4)
        axes.plot(x, y, "o", color=color)
        where = (4, -11) if name.endswith("int8") else (4, 5)
        axes.annotate(name, (x, y), xytext=where, textcoords="offset points", fontsize=7, color=color)
    local = [row["loss"] for row in rows if row["row"] == next(iter(ROWS))]
    if local:
        axes.axhline(mean(local), color="0.6", linestyle=":", label=next(iter(ROWS)))
        axes.legend(frameon=False)
    axes.set_xscale("log")
    axes.set_xlabel("bytes per token in training, both directions")
    axes.set_ylabel("test loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.25)
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--assets", help="folder with models/ and data/")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tune", action="store_true", help="look for learning rates instead")
    parser.add_argument("--results", default=str(RESULTS), help="folder of the result files")
    parser.add_argument("--png", help="picture of loss and bytes")
    args = parser.parse_args(argv)
    folder = Path(args.results)
    results, tunings = folder / "accuracy.jsonl", folder / "learning_rates.jsonl"
    if args.assets is None:
        print(tables(list(read_rows(results)), list(read_rows(tunings))))
        if args.png:
            plot(list(read_rows(results)), args.png)
        return
    measure(args, folder, results, tunings)


def measure(args: Any, folder: Path, results: Path, tunings: Path) -> None:
    """Make the runs that are missing."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    base = str(Path(args.assets) / "models" / MODEL)
    task = load_task("shakespeare", args.assets, LENGTH)
    training, validation, test = task.train[:-HELD_OUT], task.train[-VALIDATION:], task.test[:TEST]
    cloud = Cloud(BaseModel.load(base, torch.float32))
    address = f"localhost:{cloud.start()}"

    def once(name: str, rate: float, seed: int, test_on: list, path: Path) -> float:
        found = run(name, rate, seed, task, training, test_on, base, address, args.steps)
        append_rows(path, [found])
        print(f"{name}, lr {rate:g}, seed {seed}: {found['loss']:.4f} ({found['seconds']:.0f} s)", flush=True)
        return found["loss"]

    try:
        if args.tune:
            for name in (name for name in args.rows if ROWS[name].like is None):
                known = [row for row in read_rows(tunings) if row["steps"] == args.steps]
                tune(name, known, lambda rate, name=name: once(name, rate, 0, validation, tunings))
            return
        known = {(row["row"], row["seed"]) for row in read_rows(results)}
        for seed in args.seeds:
            for name in args.rows:
                if (name, seed) not in known:
                    once(name, tuned(list(read_rows(tunings)), name), seed, test, results)
    finally:
        cloud.stop()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
