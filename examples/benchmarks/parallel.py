"""Head-parallel D2FT beside other ways to train one model on several processes: bytes, seconds and memory per rank.

    python examples/benchmarks/parallel.py --json examples/benchmarks/results/parallel.json              # ViT-small
    python examples/benchmarks/parallel.py --model llama --hidden 512 --heads 8 --kv-heads 4 --layers 6 --length 128

Starts its processes itself, each with one thread on a core of its own. All get the same model and micro-batches, and
train everything; a step is forward and backward until the gradients are ready for the optimizer. Variants take turns,
and begin with another one in every repeat. Bytes are counted below the code that sends them (`collectives.py`).
Compute seconds of D2FT are those in which the heads run, exchanges left out; of the others the seconds of the main
thread, which does not run while it waits. Then the last rank gets a busy neighbour on its core, and capacities are
calibrated to what the ranks achieve beside it. Weights are random: nothing measured here depends on them.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from collectives import Collectives
from parallel_micro import micro_measurements
from parallel_peers import data_parallel, fully_sharded, tensor_parallel, transformers_tensor_parallel
from parallel_table import merge, table
from peft import get_peft_model
from rows import add_shape, command_line
from step_time import build_model, make_batch, peak_memory
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from d2ft_peft import D2FTConfig, Schedule
from d2ft_peft.head_parallel import HeadParallel, calibrate


SCHEDULES = {
    "all FULL": {"num_full": 1.0},
    "3F+2S": {"num_full": 0.6},
    "2F+1O+2S": {"num_full": 0.4, "num_forward_only": 0.2},
    "3F+2S spread": {"num_full": 0.6, "tie_break": "spread"},
}
"""D2FT's settings, in shares of the micro-batches of a step."""


@dataclass(frozen=True)
class Variant:
    """One way to run a step.

    Attributes:
        model: What this process holds.
        run: Runs a step; returns the loss.
        parallel: The head-parallel engine, if it is one.
        schedule: What D2FT runs.
    """

    model: torch.nn.Module
    run: Callable[[], torch.Tensor]
    parallel: HeadParallel | None = None
    schedule: Schedule | None = None


def join(batches: list[dict]) -> dict:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def own_samples(batches: list[dict]) -> dict:
    """This rank's share of the step's samples, under data parallelism."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return {key: value.chunk(ranks)[rank] for key, value in join(batches).items()}


def d2ft(parallel: HeadParallel, batches: list[dict], **setting) -> Variant:
    schedule = plan(parallel, batches, **setting)
    run = functools.partial(parallel.forward_backward, batches, schedule)
    return Variant(parallel.model, run, parallel, schedule)


def head_parallel(model: torch.nn.Module, n: int) -> HeadParallel:
    # Capacities are set later, as everything else that a schedule depends on; the scores must be ready for all of it.
    config = D2FTConfig(
        head_parallel=True, train_boundary=True, forward_score="weight_magnitude",
        device_capacities=[1.0] * dist.get_world_size(),
    )  # fmt: skip
    # Without overlap: exchanges in the background would take processor time from the heads that are timed.
    return HeadParallel(get_peft_model(copy.deepcopy(model), config).train(), num_micro_batches=n, overlap=0)


def plan(parallel: HeadParallel, batches: list[dict], **setting) -> Schedule:
    """The schedule of a step under other settings than the engine was made with."""
    config = parallel.planner.config
    for name in ("num_full", "num_forward_only", "device_capacities"):
        setattr(config, name, setting.get(name))
    config.tie_break = setting.get("tie_break", "aligned")
    return parallel.planner.plan([dict(batch) for batch in batches])


def make_variants(args: argparse.Namespace, model: torch.nn.Module, batches: list[dict]) -> dict[str, Variant]:
    n, ranks = len(batches), dist.get_world_size()
    mesh, parallel, variants = init_device_mesh("cpu", (ranks,)), head_parallel(model, n), {}
    for name, setting in SCHEDULES.items():
        counts = {key: round(value * n) if key != "tie_break" else value for key, value in setting.items()}
        variants[f"D2FT {name}"] = d2ft(parallel, batches, **counts)
    capacities = [round(0.8 - 0.4 * rank / (ranks - 1), 3) for rank in range(ranks)]
    variants["D2FT unequal"] = d2ft(parallel, batches, device_capacities=capacities)
    everything, three = join(batches), join(batches[: round(0.6 * n)])
    cut, step = tensor_parallel(model, mesh)
    variants["tensor parallel"] = Variant(cut, functools.partial(step, everything))
    variants["tensor parallel, 3 of 5"] = Variant(cut, functools.partial(step, three))

    def peer(make, batch) -> Variant:
        of_peer, step = make(model, mesh)
        return Variant(of_peer, functools.partial(step, batch))

    if args.model == "llama":
        variants["transformers tp_plan"] = peer(transformers_tensor_parallel, everything)
    variants["DDP"] = peer(data_parallel, own_samples(batches))
    variants["FSDP2"] = peer(fully_sharded, own_samples(batches))
    return variants


def timed(variant: Variant) -> dict[str, float]:
    """Seconds of one step: on the clock, of the main thread, and of D2FT's heads."""
    variant.model.zero_grad()
    timeline = variant.parallel.timeline if variant.parallel else None
    if timeline:
        timeline.on = True
        timeline.spans.clear()
    dist.barrier()
    cpu, wall = time.thread_time(), time.perf_counter()
    variant.run()
    found = {"step": time.perf_counter() - wall, "thread": time.thread_time() - cpu}
    if timeline:
        timeline.on, found["heads"] = False, timeline.compute_seconds
    variant.model.zero_grad()
    return found


def timings(variants: dict[str, Variant], repeats: int) -> dict[str, list[dict[str, float]]]:
    """Every variant once to warm up, then `repeats` times, in turn."""
    names, found = list(variants), {name: [] for name in variants}
    for variant in variants.values():
        timed(variant)
    for repeat in range(repeats):
        first = repeat * len(names) // repeats
        for name in names[first:] + names[:first]:
            found[name].append(timed(variants[name]))
    return found


def gradient_norm(variant: Variant) -> float:
    """Norm of all gradients on all ranks: that of one process, if a variant is right."""
    if variant.parallel:
        return variant.parallel.clip_grad_norm_(float("inf")).item()
    gradients = [p.grad for p in variant.model.parameters() if p.grad is not None]
    whole = (g.full_tensor() if isinstance(g, DTensor) else g for g in gradients)
    return sum(g.double().square().sum().item() for g in whole) ** 0.5


def facts(variant: Variant) -> dict:
    """What one step moves and allocates, and what this process holds."""
    variant.model.zero_grad()
    if variant.parallel:
        variant.parallel.traffic.reset()
    with Collectives() as counted:
        loss = variant.run().item()
    found = {"loss": loss, "gradient_norm": gradient_norm(variant)}
    found |= {"sent": sum(counted.sent.values()), "received": sum(counted.received.values())}
    if variant.parallel:
        traffic = variant.parallel.traffic
        found["purposes"] = {purpose: [traffic.sent[purpose], traffic.received[purpose]] for purpose in traffic.sent}
        found["rows"] = traffic.rows
    else:
        found["rows"] = counted.functional_rows()
    variant.model.zero_grad()
    local = [p.to_local() if isinstance(p, DTensor) else p for p in variant.model.parameters()]
    found["parameters"] = sum(p.numel() for p in local)
    found["trained"] = sum(p.numel() for p in local if p.requires_grad)
    found["weight_bytes"] = sum(p.nbytes for p in local)
    found["peak_bytes"] = peak_memory(variant.run, "cpu")
    variant.model.zero_grad()
    return found


@contextmanager
def busy_neighbour():
    """A process that never rests, on this process's core."""
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


def slowed(args: argparse.Namespace, variants: dict[str, Variant], batches: list[dict]) -> dict:
    """The same with a busy neighbour beside the last rank: equal and calibrated capacities."""
    parallel = variants["D2FT all FULL"].parallel
    last = dist.get_rank() == dist.get_world_size() - 1
    with busy_neighbour() if last else nullcontext():
        capacities = calibrate(parallel, batches, compute_budget=0.6)
        calibrated = d2ft(parallel, batches, device_capacities=capacities)
        chosen = {name: variants[name] for name in ("D2FT 3F+2S", "tensor parallel", "tensor parallel, 3 of 5", "DDP")}
        times = timings({**chosen, "D2FT calibrated": calibrated}, args.repeats)
    return {"capacities": capacities, "loads": calibrated.schedule.loads.tolist(), "times": times}


def work(args: argparse.Namespace) -> None:
    """One process: measures, and writes what it found."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    rank = int(os.environ["RANK"])
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT reads it.
    state = PartialState(cpu=True)
    model = build_model(args).train()
    torch.manual_seed(1)
    batches = [make_batch(args, torch.device("cpu")) for _ in range(args.micro_batches)]
    if args.micro_batches * args.micro_batch_size % state.num_processes:
        raise ValueError("data parallelism needs samples of a step that divide by the processes.")
    variants = make_variants(args, model, batches)
    found = {"facts": {name: facts(variant) for name, variant in variants.items()}}
    found["schedules"] = {
        name: variant.schedule.operations.tolist() for name, variant in variants.items() if variant.schedule
    }
    found["times"] = timings(variants, args.repeats)
    found["micro"] = micro_measurements(variants["D2FT all FULL"].parallel, batches)
    if not args.no_slow:
        found["slowed"] = slowed(args, variants, batches)
    Path(args.worker, f"{rank}.json").write_text(json.dumps(found))
    state.destroy_process_group()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--processes", type=int, default=2)
    add_shape(parser, ["vit", "llama"], image_size=112, vocabulary=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-slow", action="store_true", help="leave out the part with a busy neighbour")
    parser.add_argument("--json", default=None, help="file for everything that was measured")
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict | None:
    args = parse_args(argv)
    if args.worker:
        work(args)
        return None
    if args.processes < 2:
        raise ValueError(f"--processes {args.processes} must be at least 2, or nothing is parallel.")
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.processes)]
        own = sys.argv[1:] if argv is None else argv
        subprocess.run([sys.executable, *launcher, __file__, *own, "--worker", folder], check=True)
        setting = {key: value for key, value in vars(args).items() if key not in ("worker", "json")}
        result = merge(setting, [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(args.processes)])
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    return result


if __name__ == "__main__":
    main()
