"""Seconds, FLOPs and memory of training steps: D2FT beside plain fine-tuning, LoRA, LoRA-FA, checkpointing and BAdam.

    python examples/benchmarks/speed.py --preset quick      # about 8 minutes on 2 cores
    python examples/benchmarks/speed.py --preset cpu        # an hour or two
    python examples/benchmarks/speed.py --preset llama --device cuda --bf16
    python examples/benchmarks/speed.py --cells vit_small:8:12 --schedules spread --budgets 0.6 --peers

A cell is a shape, a micro-batch size and a number of blocks; everything in it is measured side by side as in
`step_time.py`: all methods, full and LoRA, take turns at every micro-batch. A step is all forward and backward passes;
the optimizer's step is timed after it and stands in a column of its own. D2FT's schedules at a budget:

- ``aligned``: every subnet skips the same micro-batches, which are then not run at all;
- ``spread``: every subnet skips others, so every micro-batch is partly active (policy ``round_robin``);
- ``depth``: micro-batches train from some block up and run FORWARD_ONLY below (policy ``depth``);
- the name of another policy over micro-batches, with random scores: ``--schedules drop_bp lisa --budgets 0.6``.

The presets run 3 or 5 of a model's 12 blocks, all of which cost the same but for the first, whose input needs no
gradient, so ratios hardly depend on their number; an odd one has a middle block for BAdam. Llama's vocabulary shrinks
with the blocks, so that the head keeps its share.
The result file gets one line a row; rows that it already holds are not measured again, so a command can be continued.
`speed_table.py` makes tables and a picture of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import warnings
from pathlib import Path

import numpy as np
import torch
from peers import PEERS, Tuned, d2ft, plain
from rows import append_rows, command_line, read_rows
from speed_table import CELL_KEYS
from step_time import Variant, build_model, efficiency, flops_and_memory, make_batch, seconds, step_seconds

from d2ft_peft import Operation, partition_model
from d2ft_peft.engine import compile_plan
from d2ft_peft.schedule import Budget, Problem, Schedule, get_policy


BLOCKS = 12
SHAPES = {
    "vit_tiny": {"model": "vit", "hidden": 192, "heads": 3},
    "vit_small": {"model": "vit", "hidden": 384, "heads": 6},
    "vit_base": {"model": "vit", "hidden": 768, "heads": 12},
    "bert_base": {"model": "bert", "hidden": 768, "heads": 12, "length": 128},
}
for tokens in (128, 512, 2048):
    # 100 million weights at 12 blocks; 3 query heads share a key/value head.
    llama = {"model": "llama", "hidden": 768, "heads": 12, "kv_heads": 4, "intermediate": 2048, "vocabulary": 32000}
    SHAPES[f"llama_100m_{tokens}"] = llama | {"length": tokens}
PRESETS = {
    "quick": ["vit_small:4:5", "llama_100m_512:1:3", "bert_base:4:3", "llama_100m_128:1:3", "vit_tiny:1:5"],
    "vit": [f"{s}:{n}:5" for s in ("vit_tiny", "vit_small", "vit_base") for n in (1, 4, 16)],
    "bert": [f"bert_base:{n}:5" for n in (1, 4, 16)],
    "llama": [f"llama_100m_{s}:{n}:5" for s, n in ((128, 1), (128, 4), (128, 16), (512, 1), (512, 4), (2048, 1))],
}
PRESETS["cpu"] = [f"vit_tiny:{n}:5" for n in (1, 4, 16)] + [
    "vit_small:1:5", "vit_small:4:5", "vit_base:4:3", "bert_base:4:3", "llama_100m_128:1:3", "llama_100m_512:1:3",
]  # fmt: skip
PRESETS["all"] = [*PRESETS["vit"], *PRESETS["bert"], *PRESETS["llama"]]
"""Cells as SHAPE:MICRO_BATCH_SIZE:BLOCKS."""

ROW_KEYS = ("mode", "variant", "schedule", "budget")


def setting(cell: str, args: argparse.Namespace) -> tuple[dict, argparse.Namespace]:
    """What identifies the cell in the result file, and the arguments of `step_time.py` for it."""
    shape, size, blocks = cell.split(":")
    defaults = {"kv_heads": None, "intermediate": None, "image_size": 224, "length": 128, "vocabulary": 32000}
    given = defaults | SHAPES[shape] | {"layers": int(blocks), "micro_batch_size": int(size)}
    given["vocabulary"] = given["vocabulary"] * int(blocks) // BLOCKS
    given |= {key: getattr(args, key) for key in ("micro_batches", "rank", "device", "bf16")}
    device = "cpu" if args.device == "cpu" else torch.cuda.get_device_name()
    values = (shape, int(blocks), int(size), args.micro_batches, "bf16" if args.bf16 else "fp32", args.threads, device)
    return dict(zip(CELL_KEYS, (*values, args.rank), strict=True)), argparse.Namespace(**given)


def wanted(args: argparse.Namespace) -> list[tuple]:
    """Rows of a cell as (mode, variant, schedule, budget), the plain steps first in their mode."""
    rows: list[tuple] = []
    for mode in args.modes.split(","):
        rows.append((mode, "plain", None, 1.0))
        rows += [(mode, peer, None, 1.0) for peer in args.peers if mode in PEERS[peer][1]]
        rows += [(mode, "d2ft", schedule, budget) for schedule in args.schedules for budget in args.budgets]
    return rows


def make_schedule(partition, mode: str, name: str, budget: float, num_micro_batches: int) -> Schedule:
    """The schedule called `name`; aligned and spread ones are counts of micro-batches, so the budget is rounded."""
    rng = np.random.default_rng(0)
    shape = (num_micro_batches, partition.num_scheduled)
    forward_scores, backward_scores = rng.random(shape), rng.random(shape)
    if name == "depth":
        # Below the forward scores and falling with the depth: it then runs as many micro-batches as it can, all about
        # equally deep, which needs the least memory.
        forward_scores = np.ones(shape)
        backward_scores = np.tile(0.4 + 0.1 * partition.subnet_blocks / BLOCKS, (num_micro_batches, 1))
    counted = {"aligned": "bilevel", "spread": "round_robin"}
    if name in counted:
        forward_scores = backward_scores = np.ones(shape)
    problem = Problem(
        forward_scores=forward_scores,
        backward_scores=backward_scores,
        budget=Budget(num_full=max(1, round(budget * num_micro_batches)))
        if name in counted
        else Budget(compute=budget),
        # A backward pass costs two forward passes, or one where the weights are frozen.
        costs=np.tile([0, 1 / 3 if mode == "full" else 1 / 2, 1], (partition.num_scheduled, 1)),
        blocks=partition.subnet_blocks,
        rng=rng,
    )
    return get_policy(counted.get(name, name))(problem)


def make_variants(rows: list[tuple], given: argparse.Namespace) -> tuple[dict[tuple, Variant], dict[tuple, Tuned]]:
    """What is measured for each row, and the model with its optimizer; D2FT's schedules of a mode share one."""
    base = build_model(given).to(given.device)
    batch = make_batch(given, torch.device(given.device))
    partition = partition_model(base)
    tuned: dict[tuple, Tuned] = {}
    models: dict[tuple, Tuned] = {}
    variants = {}
    for row in rows:
        mode, name, schedule, budget = row
        if (mode, name) not in models:
            make = {"plain": plain, "d2ft": d2ft}.get(name) or PEERS[name][0]
            models[mode, name] = make(base, mode, given.rank)
        plans = [None] * given.micro_batches
        if name == "d2ft":
            table = make_schedule(partition, mode, schedule, budget, given.micro_batches).operations
            plans = [compile_plan(partition, operations) for operations in table]
        tuned[row] = models[mode, name]
        variants[row] = Variant(tuned[row].model, plans, batch, given)
    return variants, tuned


def measure(rows: list[tuple], given: argparse.Namespace, repeats: int) -> list[dict]:
    """Results of the rows of one cell, which are measured side by side."""
    variants, tuned = make_variants(rows, given)
    flops, memory = flops_and_memory(variants)
    optimizers = {id(t.optimizer): t.optimizer for t in tuned.values()}
    times, updates = [], []
    for i in range(repeats):
        times.append(step_seconds(variants, given.device, i * len(rows) // repeats))
        updates.append({key: seconds(optimizer.step, given.device) for key, optimizer in optimizers.items()})
    # The first update also allocates the optimizer's state.
    update = {r: statistics.median(u[id(tuned[r].optimizer)] for u in updates[1:] or updates) for r in rows}
    results = []
    for row in rows:
        reference = (row[0], "plain", None, 1.0)
        ratios = [t[row] / t[reference] for t in times]
        in_all = {r: statistics.median(t[r] for t in times) + update[r] for r in (row, reference)}
        everything = {r: memory[r] + tuned[r].resident_bytes for r in (row, reference)}
        flops_ratio = flops[row] / flops[reference]
        results.append(
            dict(zip(ROW_KEYS, row, strict=True))
            | counts(variants[row])
            | {
                "seconds": statistics.median(t[row] for t in times),
                "optimizer_seconds": update[row],
                "time_ratio": statistics.median(ratios),
                "time_ratio_range": [min(ratios), max(ratios)],
                "flops_ratio": flops_ratio,
                "efficiency": efficiency(statistics.median(ratios), flops_ratio),
                "time_ratio_with_optimizer": in_all[row] / in_all[reference],
                "memory_ratio": memory[row] / memory[reference],
                "memory_ratio_with_weights": everything[row] / everything[reference],
                "bytes": everything[row],
                "flops": flops[row],
                "repeats": repeats,
            }
        )
    return results


def counts(variant: Variant) -> dict:
    """FULL and FORWARD_ONLY micro-batches of a subnet, in the mean over the subnets."""
    table = np.array([[Operation.FULL] if plan is None else plan.operations for plan in variant.plans])
    named = {"num_full": Operation.FULL, "num_forward_only": Operation.FORWARD_ONLY}
    return {name: float((table == operation).mean(1).sum()) for name, operation in named.items()}


def run_cell(cell: str, args: argparse.Namespace, path: Path) -> None:
    """Measure what the result file lacks, beside the plain steps, and add it."""
    identity, given = setting(cell, args)
    done = list(read_rows(path))
    known = {tuple(run[key] for key in ROW_KEYS) for run in done if all(run[k] == v for k, v in identity.items())}
    missing = [row for row in wanted(args) if row not in known]
    modes = {row[0] for row in missing}
    rows = [row for row in wanted(args) if row in missing or (row[1] == "plain" and row[0] in modes)]
    if not missing:
        return
    results = measure(rows, given, args.repeats)
    append_rows(path, [identity | result for row, result in zip(rows, results, strict=True) if row in missing])
    print(f"{cell} {identity['dtype']}")
    for result in results:
        label = f"{result['schedule'] or result['variant']} {result['budget']:.1f}"
        ratios = "".join(f"{result[key]:9.3f}" for key in ("time_ratio", "flops_ratio", "memory_ratio"))
        worth = "" if result["efficiency"] is None else f"{result['efficiency']:9.2f}"
        print(f"  {result['mode']:5}{label:20}{result['seconds']:9.3f} s{ratios}{worth}", flush=True)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--preset", choices=list(PRESETS), default="quick")
    parser.add_argument("--cells", nargs="+", default=None, help="SHAPE:MICRO_BATCH_SIZE:BLOCKS, instead of a preset's")
    parser.add_argument("--modes", default="full,lora")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--schedules", nargs="*", default=["aligned", "depth", "spread"], help="also names of policies")
    parser.add_argument("--budgets", nargs="+", type=float, default=None, help="quick: 0.6 0.4; else 0.8 0.6 0.5 0.4")
    parser.add_argument("--micro-batches", type=int, default=None, help="quick: 5; else 10")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--json", default=str(Path(__file__).parent / "results" / "speed.jsonl"))
    args = parser.parse_args(argv)
    quick = args.preset == "quick" and args.cells is None
    args.budgets = args.budgets or ([0.6, 0.4] if quick else [0.8, 0.6, 0.5, 0.4])
    args.micro_batches = args.micro_batches or (5 if quick else 10)
    if "badam" in args.peers and importlib.util.find_spec("badam") is None:
        parser.error("badam is not installed: pip install --no-deps badam, or choose other --peers")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
    warnings.filterwarnings("ignore", message="BAdam expect model to be loaded in fp16/bf16")
    for cell in args.cells or PRESETS[args.preset]:
        run_cell(cell, args, Path(args.json))


if __name__ == "__main__":
    main()
