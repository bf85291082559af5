"""Many edges on one cloud: throughput against one edge, fairness, and how long a step takes.

    python examples/benchmarks/dlora_load.py --out examples/benchmarks/results/dlora/load.jsonl
    python examples/benchmarks/dlora_load.py --table examples/benchmarks/results/dlora/load.jsonl

The cloud is a process of its own, on one core. The edges are light: threads of two more processes, each with a model,
a session, a connection and an optimizer of its own; head and loss are the cloud's, and the adapters are those of one
block (q and v), so that what an edge computes is small beside what it asks for. All of them begin together, train for
the same seconds, and count the micro-batches that they finish. Numbers of edges take turns in every repeat.
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
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from rows import append_rows, command_line, read_rows
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from d2ft_peft.dlora import connect
from d2ft_peft.report import format_table


VOCABULARY = 256


def save_model(folder: str, hidden: int, layers: int) -> None:
    """A random Llama."""
    set_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


class Edge(threading.Thread):
    """One edge: trains until the time is over, and notes when each micro-batch was done."""

    def __init__(self, number: int, args: argparse.Namespace, begin: threading.Barrier):
        super().__init__(daemon=True)
        config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], layers_to_transform=[args.layers // 2])
        self.model = connect(
            args.address, args.base, config, head="cloud", in_flight=args.in_flight, dtype=torch.float32
        ).train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)
        draw = torch.Generator().manual_seed(number)
        self.ids = torch.randint(0, VOCABULARY, (args.rows, args.length), generator=draw)
        self.begin, self.seconds, self.micro_batches = begin, args.seconds, args.in_flight
        self.took: list[float] = []

    def run(self) -> None:
        self.step()  # the first one builds what a session needs
        self.begin.wait()
        now = time.perf_counter()
        end = now + self.seconds
        while True:
            last, _ = now, self.step()
            now = time.perf_counter()
            if now > end:
                return
            self.took.append(now - last)

    def step(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def be_edges(args: argparse.Namespace) -> None:
    """Run some edges, and print what they did."""
    torch.set_num_threads(1)
    begin = threading.Barrier(args.edges[0] + 1)
    edges = [Edge(number, args, begin) for number in range(args.edges[0])]
    for edge in edges:
        edge.start()
    while begin.n_waiting < len(edges):
        if not all(edge.is_alive() for edge in edges):
            raise RuntimeError("an edge ended before its time; see above.")
        time.sleep(0.01)
    print("ready", flush=True)
    sys.stdin.readline()
    cpu = time.process_time()
    begin.wait()
    for edge in edges:
        edge.join()
    cpu = time.process_time() - cpu
    replays = sum(edge.model.remote_span.link.traffic.replays for edge in edges)
    print(json.dumps({"took": [edge.took for edge in edges], "replays": replays, "cpu": cpu}), flush=True)
    for edge in edges:
        edge.model.disconnect()


@contextlib.contextmanager
def cloud(base: str) -> Iterator[str]:
    """A cloud in a process of its own; its address."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "d2ft_peft.dlora.cloud", base, "--port", "0", "--dtype", "float32"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        if not line.startswith("serving"):
            raise RuntimeError("the cloud did not start; see above.")
        yield line.split()[-1]
    finally:
        process.terminate()
        process.wait()


def load(address: str, base: str, number: int, args: argparse.Namespace) -> dict:
    """Let some edges train at the same time, and sum up."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    processes = min(args.processes, number)
    me = [sys.executable, __file__, *args.given, "--address", address, "--base", base, "--edges"]
    shares = [number // processes + (process < number % processes) for process in range(processes)]
    started = [
        subprocess.Popen([*me, str(s)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for s in shares
    ]
    if any(process.stdout.readline() != "ready\n" for process in started):
        raise RuntimeError("the edges did not start; see above.")
    for process in started:
        process.stdin.write("begin\n")
        process.stdin.flush()
    found = [json.loads(process.communicate()[0]) for process in started]
    took = [times for of in found for times in of["took"]]
    together = [seconds for times in took for seconds in times]
    return {
        "finished": [len(times) * args.in_flight for times in took], "replays": sum(of["replays"] for of in found),
        "p50": float(np.percentile(together, 50)), "p95": float(np.percentile(together, 95)),
        "edge_cpu": sum(of["cpu"] for of in found), "load": os.getloadavg()[0],
    }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Let numbers of edges take turns on one cloud."""
    with tempfile.TemporaryDirectory() as base:
        save_model(base, args.hidden, args.layers)
        with cloud(base) as address:
            for _ in range(args.repeats):
                for number in args.edges:
                    row = {"edges": number, "seconds": args.seconds, "in_flight": args.in_flight,
                           "tokens": args.rows * args.length, "hidden": args.hidden, "layers": args.layers,
                           **load(address, base, number, args)}  # fmt: skip
                    append_rows(args.out, [row])
                    print(table([row]).splitlines()[-1], flush=True)


def table(rows: list[dict]) -> str:
    """A line for each number of edges: medians of the repeats."""
    lines, one = [], None
    for number in dict.fromkeys(row["edges"] for row in rows):
        of = [row for row in rows if row["edges"] == number]
        rate = statistics.median(sum(row["finished"]) / row["seconds"] for row in of)
        one = one or rate
        lines.append(
            {
                "edges": number, "micro-batches/s": f"{rate:.1f}", "against the first": f"{rate / one:.2f}",
                "max/min": f"{statistics.median(max(r['finished']) / max(1, min(r['finished'])) for r in of):.3f}",
                "fewest": min(min(row["finished"]) for row in of),
                "p50 s": f"{statistics.median(row['p50'] for row in of):.3f}",
                "p95 s": f"{statistics.median(row['p95'] for row in of):.3f}", "repeats": len(of),
            }
        )  # fmt: skip
    return format_table(lines)


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", help="file that gets a line a run")
    parser.add_argument("--table", help="show such a file")
    parser.add_argument("--edges", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="of the edges")
    parser.add_argument("--in-flight", type=int, default=1)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.given = sys.argv[1:] if argv is None else argv
    if args.table:
        print(table(list(read_rows(args.table))))
    elif args.address:
        be_edges(args)
    else:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        run(args)


if __name__ == "__main__":
    main()
