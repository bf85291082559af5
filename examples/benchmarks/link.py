"""Step time of two head-parallel processes over a link of limited bandwidth, with and without overlap.

    sudo python examples/benchmarks/link.py --out examples/benchmarks/results/link.json --png docs/images/timeline.png

Each process runs in a network namespace of its own. The two are joined by a pair of virtual Ethernet devices, and a
token bucket filter (`tc qdisc ... tbf`) on each end lets `rate` Mbit/s pass in either direction; 0 means no limit.
So the sockets that gloo uses are what is slow; nothing in the package knows. Making namespaces takes root rights, `ip`
and `tc` (iproute2) on Linux.

A step is forward, backward and the sum of replicated gradients of ten micro-batches. Variants (what each micro-batch
does, and `overlap` of `HeadParallel`) take turns in every repeat and begin with another one each time; the time of a
step is that of the slower process after a common start, and rows hold medians. Weights are random.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from rows import command_line, pyplot, save
from transformers import ViTConfig, ViTForImageClassification, set_seed

from d2ft_peft import D2FTConfig, Schedule
from d2ft_peft.head_parallel import HeadParallel


# Operations of the ten micro-batches, on all subnets alike: F(ULL), O (FORWARD_ONLY), S(HORTCUT).
SCHEDULES = {"5F": "FFFFFFFFFF", "3F+2S": "FFFFFFSSSS", "2F+1O+2S": "FFFFOOSSSS"}
OVERLAPS = (0, 1, 2, 3)
ADDRESSES = ("10.231.0.1", "10.231.0.2")
COLORS = {
    "forward": "C0", "backward": "C1", "dispatch": "C2", "combine": "C4",
    "combine backward": "C6", "dispatch backward": "C8", "wait": "0.85",
}  # fmt: skip


@contextlib.contextmanager
def namespaces(rate: float) -> Iterator[list[str]]:
    """Two network namespaces with a link of `rate` Mbit/s between them; their names."""
    names = [f"d2ft{os.getpid()}_{rank}" for rank in range(2)]
    try:
        for name in names:
            call("ip", "netns", "add", name)
        call("ip", "link", "add", "link0", "netns", names[0], "type", "veth", "peer", "name", "link1",
             "netns", names[1])  # fmt: skip
        for rank, name in enumerate(names):
            inside = ("ip", "netns", "exec", name)
            call(*inside, "ip", "link", "set", "lo", "up")
            call(*inside, "ip", "addr", "add", f"{ADDRESSES[rank]}/24", "dev", f"link{rank}")
            # Large packets, so that the filter passes them whole: cutting them up would take the processor's time.
            call(*inside, "ip", "link", "set", f"link{rank}", "mtu", "60000", "up")
            if rate:
                call(*inside, "tc", "qdisc", "add", "dev", f"link{rank}", "root", "tbf", "rate", f"{rate}mbit",
                     "burst", "64kb", "latency", "100ms")  # fmt: skip
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def call(*command: str) -> None:
    subprocess.run(command, check=True)


def run_workers(rate: float, args: argparse.Namespace) -> dict:
    """Start a process in each namespace; what the first one wrote."""
    with namespaces(rate) as names, tempfile.TemporaryDirectory() as folder:
        out, started = Path(folder) / "out.json", []
        for rank, name in enumerate(names):
            variables = {
                **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0],
                "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": f"link{rank}", "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(out), "--rates", str(rate)]
            started.append(subprocess.Popen(["ip", "netns", "exec", name, *command], env=variables))
        codes = [process.wait() for process in started]
        if any(codes):
            raise RuntimeError(f"the processes at {rate} Mbit/s ended with {codes}.")
        return json.loads(out.read_text())


def make_model(args: argparse.Namespace) -> torch.nn.Module:
    set_seed(0)
    config = ViTConfig(
        hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_attention_heads=args.heads,
        num_hidden_layers=args.layers, image_size=64, patch_size=8, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    lora = {"r": 16} if args.mode == "lora" else {}
    return get_peft_model(model, D2FTConfig(head_parallel=True, modules_to_save=["classifier"], **lora)).train()


def bandwidth(at_once: int, megabytes: int = 6, repeats: int = 5) -> int:
    """Mbit/s in each direction that rows get in as many exchanges under way at once; the median."""
    took, rank, part = [], dist.get_rank(), megabytes // at_once
    splits = [0, part] if rank == 0 else [part, 0]
    buffers = [(torch.empty(part, 1_000_000, dtype=torch.uint8), torch.zeros(part, 1_000_000, dtype=torch.uint8))
               for _ in range(at_once)]  # fmt: skip
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        works = [dist.all_to_all_single(*pair, splits, splits, async_op=True) for pair in buffers]
        for each in works:
            each.wait()
        took.append(time.perf_counter() - begin)
    return round(8 * part * at_once / statistics.median(took))


def work(args: argparse.Namespace) -> None:
    """Measure on this process; the first one writes what both found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measured = [bandwidth(at_once) for at_once in (1, 2, 3)]
    parallel = HeadParallel(make_model(args))
    pixels = torch.randn(10, args.images, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    batches = [{"pixel_values": p, "labels": torch.zeros(args.images, dtype=torch.long)} for p in pixels]
    partition = parallel.planner.partition
    schedules = {
        name: Schedule(
            [["SOF".index(cell)] * partition.num_scheduled for cell in cells], blocks=partition.subnet_blocks
        )
        for name, cells in SCHEDULES.items()
    }
    parallel.planner.prepare(batches[0])

    def step(name: str, overlap: int) -> float:
        parallel.overlap = overlap
        dist.barrier()
        begin = time.perf_counter()
        parallel.forward_backward(batches, schedules[name])
        return time.perf_counter() - begin

    variants = [(name, overlap) for name in SCHEDULES for overlap in OVERLAPS]
    seconds, moved = {variant: [] for variant in variants}, {}
    for repeat in range(-1, args.repeats):  # the first one is the warm-up
        first = repeat % len(variants)
        for variant in variants[first:] + variants[:first]:
            parallel.traffic.reset()
            took = torch.tensor([step(*variant)])
            moved[variant] = parallel.traffic.rows
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if repeat >= 0:
                seconds[variant].append(took.item())
    timelines = {}
    for overlap in (0, 2) if args.png else ():
        parallel.timeline.spans.clear()
        parallel.timeline.on = True
        step("5F", overlap)
        parallel.timeline.on = False
        everyone: list = [None, None]
        dist.all_gather_object(everyone, [asdict(span) for span in parallel.timeline.spans])
        timelines[str(overlap)] = everyone
    if dist.get_rank() == 0:
        rows = [
            {
                "rate_mbit": args.rates[0], "measured_mbit": measured, "schedule": name,
                "overlap": overlap, "mode": args.mode,
                "seconds": statistics.median(times), "least": min(times), "most": max(times),
                "repeats": len(times), "bytes_of_rows": moved[name, overlap], "hidden": args.hidden,
                "heads": args.heads, "blocks": args.layers, "images": args.images, "torch": torch.__version__,
            }
            for (name, overlap), times in seconds.items()
        ]  # fmt: skip
        Path(args.worker).write_text(json.dumps({"rows": rows, "timelines": timelines}))
    dist.destroy_process_group()


def table(rows: list[dict]) -> str:
    """Times by rate and overlap, and their ratios to all FULL at the same rate and overlap."""
    lines = ["| Mbit/s | overlap | " + " | ".join(SCHEDULES) + " |", "|---" * (len(SCHEDULES) + 2) + "|"]
    found = {(row["rate_mbit"], row["overlap"], row["schedule"]): row["seconds"] for row in rows}
    for rate, overlap in dict.fromkeys((row["rate_mbit"], row["overlap"]) for row in rows):
        times = [found[rate, overlap, name] for name in SCHEDULES]
        cells = [f"{seconds:.2f} s ({seconds / times[0]:.2f})" for seconds in times]
        lines.append(f"| {rate or 'no limit'} | {overlap} | " + " | ".join(cells) + " |")
    moved = {row["schedule"]: row["bytes_of_rows"] for row in rows}
    shares = ", ".join(f"{name} {bytes_:,} ({bytes_ / moved['5F']:.3f})" for name, bytes_ in moved.items())
    rates = {row["rate_mbit"]: row["measured_mbit"] for row in rows}
    return "\n".join([*lines, "", f"bytes of rows on a rank: {shares}",
                      f"Mbit/s that one, two, three exchanges at once get each way: {rates}"])  # fmt: skip


def plot(timelines: dict, path: str, rate: float) -> None:
    """What both ranks do, and when, without and with overlap."""
    plt = pyplot()

    figure, axes = plt.subplots(2, 1, figsize=(11, 5), sharex=True)
    for axis, (overlap, ranks) in zip(axes, timelines.items(), strict=True):
        start = min(span["begin"] for spans in ranks for span in spans)
        for rank, spans in enumerate(sorted(of_rank, key=itemgetter("begin")) for of_rank in ranks):
            free = [0.0, 0.0]  # when the last exchange in each half of the lane ended: several may be under way
            for span in spans:
                begin, end = span["begin"] - start, span["end"] - start
                lane, height = -3 * rank, 0.8
                if span["what"] not in ("forward", "backward", "wait"):
                    half = 0 if free[0] <= begin else 1
                    free[half], lane, height = end, lane - 0.8 - 0.42 * half, 0.4
                axis.barh(lane, end - begin, left=begin, height=height, color=COLORS[span["what"]],
                          edgecolor="white", linewidth=0.3)  # fmt: skip
        end = max(span["end"] for spans in ranks for span in spans) - start
        axis.set_yticks(
            [0, -1, -3, -4], ["rank 0 runs heads", "rank 0 exchanges", "rank 1 runs heads", "rank 1 exchanges"]
        )
        axis.tick_params(labelsize=8)
        axis.set_title(f"overlap={overlap}: blocks forward and backward in {end:.2f} s", fontsize=9, loc="left")
    axes[-1].set_xlabel(f"seconds (a step, all FULL, {rate:g} Mbit/s)", fontsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in COLORS.values()]
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(handles, list(COLORS), loc="lower center", ncols=len(COLORS), fontsize=8, frameon=False)
    save(figure, path)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[1000.0, 500.0, 0.0], help="Mbit/s, 0: no limit")
    parser.add_argument("--mode", choices=("full", "lora"), default="full")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--images", type=int, default=2, help="images of a micro-batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="JSON file for the rows")
    parser.add_argument("--png", help="picture of the timeline at the first rate")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    rows = []
    for rate in args.rates:
        found = run_workers(rate, args)
        rows += found["rows"]
        if args.png and rate == args.rates[0]:
            plot(found["timelines"], args.png, rate)
        if args.out:
            Path(args.out).write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
