"""Seconds, FLOPs and memory of whole training steps under D2FT, side by side with the plain step of the same model.

    python examples/benchmarks/step_time.py                          # ViT-small at 224 px, full fine-tuning and LoRA
    python examples/benchmarks/step_time.py --model llama --hidden 512 --heads 8 --kv-heads 4 --layers 8 --length 512

A step is all forward and backward passes of N micro-batches, ready for the optimizer. The variants take turns at every
micro-batch, so that a busy machine slows all of them, and begin with another variant in every repeat; where a turn
changes the model, a pass that is not timed goes first. Each ratio is the median over the repeats of the variant's time
over the plain step's time of the same repeat. Efficiency is the share of time saved over the share of FLOPs saved.
Gradients exist already, as they do from the second micro-batch of a step on, and every method adds to them. Weights are
random: speed does not depend on them. `speed.py` puts other methods and shapes beside these.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import statistics
import time
import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from rows import add_shape, command_line
from torch.profiler import ProfilerActivity, profile

from d2ft_peft import D2FTConfig, partition_model
from d2ft_peft.costs.counter import flop_counter
from d2ft_peft.engine import Plan, compile_plan, get_runtime
from d2ft_peft.schedule import Budget, Problem, get_policy


def build_model(args: argparse.Namespace) -> torch.nn.Module:
    """A randomly initialised model of the given shape."""
    shape = {"hidden_size": args.hidden, "num_attention_heads": args.heads, "num_hidden_layers": args.layers}
    shape["intermediate_size"] = args.intermediate or 4 * args.hidden
    torch.manual_seed(0)
    if args.model == "vit":
        return tf.ViTForImageClassification(tf.ViTConfig(**shape, image_size=args.image_size, num_labels=100))
    if args.model == "bert":
        config = tf.BertConfig(**shape, num_labels=2, max_position_embeddings=max(512, args.length))
        return tf.BertForSequenceClassification(config)
    shape["num_key_value_heads"] = args.kv_heads or args.heads
    return tf.LlamaForCausalLM(tf.LlamaConfig(**shape, vocab_size=args.vocabulary, use_cache=False))


def make_batch(args: argparse.Namespace, device: torch.device) -> dict[str, torch.Tensor]:
    n = args.micro_batch_size
    if args.model == "vit":
        pixels = torch.randn(n, 3, args.image_size, args.image_size, device=device)
        return {"pixel_values": pixels, "labels": torch.randint(100, (n,), device=device)}
    ids = torch.randint(10, 1000, (n, args.length), device=device)
    labels = ids if args.model == "llama" else torch.randint(2, (n,), device=device)
    return {"input_ids": ids, "labels": labels}


def adapt(model: torch.nn.Module, mode: str, rank: int, d2ft: bool) -> torch.nn.Module:
    """The model as it is fine-tuned: plainly or by D2FT, in full or by LoRA; the head trains in every case."""
    model = copy.deepcopy(model)
    head = [name for name in ("classifier", "lm_head") if hasattr(model, name)]
    if d2ft:
        config = D2FTConfig(r=rank, modules_to_save=head) if mode == "lora" else D2FTConfig(modules_to_save=head)
        return get_peft_model(model, config)
    projections = partition_model(model).projections
    if mode == "lora":
        return get_peft_model(model, LoraConfig(r=rank, target_modules=list(projections), modules_to_save=head))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[0] in projections or name.split(".")[0] in head)
    return model


def make_plans(partition, num_micro_batches: int, num_full: int, num_forward_only: int, placement: str):
    """Plans of a step with the given counts: ``spread`` (every micro-batch partly active) or ``aligned``."""
    shape = (num_micro_batches, partition.num_scheduled)
    problem = Problem(
        forward_scores=np.ones(shape),
        backward_scores=np.ones(shape),
        budget=Budget(num_full=num_full, num_forward_only=num_forward_only),
        blocks=partition.subnet_blocks,
    )
    schedule = get_policy("round_robin" if placement == "spread" else "bilevel")(problem)
    return [compile_plan(partition, row) for row in schedule.operations]


@dataclass(frozen=True)
class Variant:
    """A training step of a model on one batch that stands for all micro-batches.

    Attributes:
        model: The model as it is fine-tuned.
        plans: D2FT's plan of each micro-batch, None for a plain one.
        batch: Arguments of the model.
        args: Number of micro-batches, device, precision.
    """

    model: torch.nn.Module
    plans: list[Plan | None]
    batch: dict[str, torch.Tensor]
    args: argparse.Namespace

    @property
    def distinct_plans(self) -> dict[Plan | None, int]:
        """How often each plan occurs, without micro-batches that are skipped as a whole: those are not run."""
        return Counter(plan for plan in self.plans if plan is None or not plan.skipped)

    def run(self, plan: Plan | None) -> None:
        """Forward and backward of one micro-batch."""
        args = self.args
        autocast = torch.autocast(args.device, torch.bfloat16) if args.bf16 else contextlib.nullcontext()
        with get_runtime(self.model).use(plan) if plan is not None else contextlib.nullcontext():
            with autocast:
                loss = self.model(**self.batch).loss / args.micro_batches
            if loss.requires_grad:
                loss.backward()


def seconds(run, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def step_seconds(variants: dict, device: str, first: int = 0) -> dict:
    """Seconds of a step of each variant, which take turns at every micro-batch and begin with number `first`."""
    names = list(variants)
    total = dict.fromkeys(names, 0.0)
    last = None
    for i in range(len(variants[names[0]].plans)):
        for name in names[first:] + names[:first]:
            variant, plan = variants[name], variants[name].plans[i]
            if plan is not None and plan.skipped:
                continue
            if variant.model is not last:
                variant.run(plan)  # the first pass after another model's is slower by up to 5 %
            total[name] += seconds(functools.partial(variant.run, plan), device)
            last = variant.model
    return total


def peak_memory(run, device: str) -> int:
    """Bytes that `run` allocates on top of what it finds (weights and gradients), at its peak."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(np.maximum(np.cumsum(changes), 0).max())


def count_flops(run) -> int:
    with flop_counter() as counter:
        run()
    return counter.get_total_flops()


def flops_and_memory(variants: dict) -> tuple[dict, dict]:
    """FLOPs of a step of each variant, and the highest peak among its micro-batches.

    Micro-batches of equal plans are equal and are run once. The FLOPs come first: that pass is the warm-up, too, and
    allocates the gradients, which are then no part of the peak.
    """

    def per_plan(measure_run):
        found: dict = {}
        for variant in variants.values():
            for plan in variant.distinct_plans:
                if (variant.model, plan) not in found:
                    found[variant.model, plan] = measure_run(functools.partial(variant.run, plan), variant.args.device)
        return found

    flops, memory = per_plan(lambda run, _: count_flops(run)), per_plan(peak_memory)
    counts = {name: variant.distinct_plans.items() for name, variant in variants.items()}
    return (
        {name: sum(n * flops[variants[name].model, plan] for plan, n in counts[name]) for name in variants},
        {name: max(memory[variants[name].model, plan] for plan, _ in counts[name]) for name in variants},
    )


def efficiency(time_ratio: float, flops_ratio: float) -> float | None:
    """Share of time saved over share of FLOPs saved; None where hardly any FLOPs are saved."""
    return (1 - time_ratio) / (1 - flops_ratio) if flops_ratio < 0.95 else None


def repeat_seconds(variants: dict, device: str, repeats: int) -> list[dict]:
    """`step_seconds` of every repeat; the variant that begins moves on through all of them."""
    return [step_seconds(variants, device, i * len(variants) // repeats) for i in range(repeats)]


def measure(args: argparse.Namespace, mode: str) -> list[dict]:
    """Rows of one mode, the plain step first."""
    device = torch.device(args.device)
    base = build_model(args).to(device)
    batch = make_batch(args, device)
    plain = adapt(base, mode, args.rank, d2ft=False).train()
    ours = adapt(base, mode, args.rank, d2ft=True).train()
    partition = partition_model(base, args.heads_per_subnet)
    n = args.micro_batches

    steps = {"plain": Variant(plain, [None] * n, batch, args)}
    for mix in args.mixes.split(","):
        num_full, num_forward_only = (int(count) for count in mix.split("+"))
        plans = make_plans(partition, n, num_full, num_forward_only, args.placement)
        steps[(num_full, num_forward_only)] = Variant(ours, plans, batch, args)
    flops, memory = flops_and_memory(steps)
    times = repeat_seconds(steps, args.device, args.repeats)
    rows = []
    for name in steps:
        time_ratio, flops_ratio = statistics.median(t[name] / t["plain"] for t in times), flops[name] / flops["plain"]
        num_full, num_forward_only = (n, 0) if name == "plain" else name
        rows.append(
            {
                "mode": mode,
                "variant": "plain" if name == "plain" else "d2ft",
                "num_full": num_full,
                "num_forward_only": num_forward_only,
                "num_micro_batches": n,
                "seconds": statistics.median(t[name] for t in times),
                "time_ratio": time_ratio,
                "flops_ratio": flops_ratio,
                "efficiency": efficiency(time_ratio, flops_ratio),
                "memory_ratio": memory[name] / memory["plain"],
                "tflops_per_second": flops[name] / statistics.median(t[name] for t in times) / 1e12,
            }
        )
    return rows


def parse_args() -> argparse.Namespace:
    parser = command_line(__doc__)
    add_shape(parser, ["vit", "bert", "llama"], image_size=224, vocabulary=32000)
    parser.add_argument("--heads-per-subnet", type=int, default=1)
    parser.add_argument("--modes", default="full,lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--mixes", default="5+0,3+0,2+2,1+4", help="FULL+FORWARD_ONLY micro-batches of each subnet")
    parser.add_argument("--placement", choices=["spread", "aligned"], default="spread")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--json", default=None, help="file for the rows")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
    rows = []
    names = ("time", "FLOPs", "memory", "efficiency")
    print(f"{'mode':6}{'step':>16}{'seconds':>10}" + "".join(f"{name:>12}" for name in names))
    for mode in args.modes.split(","):
        for row in measure(args, mode):
            rows.append(row)
            skipped = row["num_micro_batches"] - row["num_full"] - row["num_forward_only"]
            name = "plain" if row["variant"] == "plain" else f"{row['num_full']}F+{row['num_forward_only']}O+{skipped}S"
            ratios = "".join(f"{row[key]:12.3f}" for key in ("time_ratio", "flops_ratio", "memory_ratio"))
            efficiency = "" if row["efficiency"] is None else f"{row['efficiency']:12.2f}"
            print(f"{mode:6}{name:>16}{row['seconds']:10.3f}{ratios}{efficiency}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
