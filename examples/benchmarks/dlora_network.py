"""Training across a slow link: tokens per second against the link's arithmetic limit.

    sudo python examples/benchmarks/dlora_network.py --out examples/benchmarks/results/dlora/network.jsonl
    python examples/benchmarks/dlora_network.py --table examples/benchmarks/results/dlora/network.jsonl

Cloud and edge are two processes, each in a network namespace of its own. The link between them is `link_emulator.c`:
packets of 1,500 bytes wait for their share of the rate, then for half the round trip, and are lost by chance, in
either direction; TCP is the kernel's. Making namespaces takes root rights, `ip` (iproute2), a C compiler and
/dev/net/tun on Linux.

The model is a small random Llama: bytes grow with the width, FLOPs with its square, so a small one lets the link bind.
``limit`` is what `d2ft_peft.simulate.dlora_step.HomeLink` says: a step cannot be shorter, whoever sends the bytes.
``free`` is the same step without a limit of rate, delay or loss, measured just before: what computing takes.
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
from pathlib import Path
from typing import Any, NamedTuple

import torch
from emulated_link import ADDRESSES, FREE, PORT, Network, plain_tcp
from peft import LoraConfig
from rows import append_rows, command_line, read_rows
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from d2ft_peft.dlora import connect
from d2ft_peft.report import format_table
from d2ft_peft.simulate.dlora_step import HomeLink, Phase


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTH, VOCABULARY = 64, 128
TOKENS = {100.0: 4096, 10.0: 1024, 1000.0: 8192}
"""Tokens of a step by Mbit/s: so many that bytes take longer than a few round trips."""


class Key(NamedTuple):
    """What is measured: Mbit/s, ms, per cent, congestion control of TCP, and the arguments of `connected`."""

    rate: float
    round_trip: float
    loss: float
    control: str
    placement: str
    packing: str
    in_flight: int
    connections: int = 1


def plan() -> Iterator[Key]:
    """The rows, those of a link together."""
    for rate in TOKENS:
        for round_trip in (5.0, 50.0, 150.0):
            link = (rate, round_trip, 0.0, "cubic")
            for placement in ("u_shaped", "eighth", "all"):
                if placement != "all" or rate > 10 or round_trip == 50:
                    yield Key(*link, placement, "none", 8)
            yield Key(*link, "eighth", "none", 1)
            if round_trip == 50:
                for in_flight in (2, 4):
                    yield Key(*link, "eighth", "none", in_flight)
                for placement, packing in (("all", "bf16"), ("all", "int8"), ("core", "none"), ("core", "int8")):
                    yield Key(*link, placement, packing, 8)
    for rate, round_trip in ((100.0, 50.0), (10.0, 50.0), (100.0, 5.0), (100.0, 150.0), (1000.0, 50.0)):
        for loss in (1.0, 5.0):
            for connections in (1, 8):
                yield Key(rate, round_trip, loss, "bbr", "eighth", "none", 8, connections)
    for connections in (1, 8):
        yield Key(10.0, 50.0, 1.0, "cubic", "eighth", "none", 8, connections)
        yield Key(100.0, 50.0, 1.0, "cubic", "eighth", "none", 8, connections)


def save_model(folder: str, hidden: int, layers: int) -> None:
    """A random Llama of the proportions of stories260k."""
    set_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=VOCABULARY, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


# ---------------------------------------------------------------- the edge, in a process of its own


def connected(address: str, base: str, placement: str, packing: str, in_flight: int, connections: int = 1) -> Any:
    """An edge's model in one of the placements; only what is alive in it can be trained."""
    options: dict[str, Any] = {"r": 8, "target_modules": PROJECTIONS}
    if placement == "core":
        options["r"] = 16
    blocks = (1, 1) if placement == "u_shaped" else (0, 0)
    depth = LlamaConfig.from_pretrained(base).num_hidden_layers
    if placement == "u_shaped":
        options["layers_to_transform"] = [0, depth - 1]
    model = connect(
        address, base, LoraConfig(**options), edge_blocks=blocks, packing=packing, in_flight=in_flight,
        connections=connections,
        crossing="core" if placement == "core" else "hidden", dtype=torch.float32,
    )  # fmt: skip
    if placement == "eighth":
        layers = list(model.remote_span.adapters.layers.values())
        for number, layer in enumerate(layers):
            layer.requires_grad_(number % 8 == 0)
    return model.train()


def measure(address: str, base: str, variant: dict[str, Any]) -> dict[str, Any]:
    """Steps of one variant: seconds, and what crossed in each phase of a step."""
    set_seed(0)
    model = connected(
        address, base, variant["placement"], variant["packing"], variant["in_flight"], variant.get("connections", 1)
    )
    traffic = model.remote_span.link.traffic
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, VOCABULARY, (variant["tokens"] // LENGTH, LENGTH))
    seconds, phases = [], []
    for step in range(variant["steps"] + variant["warm_up"]):
        marks = [(traffic.sent, traffic.received, traffic.round_trips)]
        begun = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        marks.append((traffic.sent, traffic.received, traffic.round_trips))
        loss.backward()
        marks.append((traffic.sent, traffic.received, traffic.round_trips))
        optimizer.step()
        optimizer.zero_grad()
        if step >= variant["warm_up"]:
            seconds.append(time.perf_counter() - begun)
            phases.append([[b - a for a, b in zip(*pair, strict=True)] for pair in zip(marks, marks[1:], strict=False)])
    replays = traffic.replays
    model.disconnect()
    # A gradient that wants no answer is received on the way, but nobody waits for its round trip.
    silent = 0 if variant["placement"] == "u_shaped" else 1
    phases = phases[-1]
    phases[1][2] -= silent * variant["in_flight"]
    return {
        "seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds), "replays": replays,
        "phases": [[up, down, trips // variant["in_flight"]] for up, down, trips in phases], "loss_value": loss.item(),
    }  # fmt: skip


def be_edge(address: str, base: str) -> None:
    """Measure what comes in on the standard input, a line of JSON each."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(measure(address, base, json.loads(line))), flush=True)


# ---------------------------------------------------------------- both processes


@contextlib.contextmanager
def both_ends(base: str) -> Iterator[tuple[Network, subprocess.Popen]]:
    """A network with a cloud at one end, and an edge at the other that takes variants on its standard input."""
    with tempfile.TemporaryDirectory() as folder:
        network, started = Network(folder), []
        try:
            network.set(*FREE, "cubic")
            serve = ["-m", "d2ft_peft.dlora.cloud", base, "--host", ADDRESSES[0], "--port", str(PORT), "--insecure"]
            cloud = network.start(0, *serve, "--dtype", "float32", stdout=subprocess.PIPE)
            started.append(cloud)
            if not cloud.stdout.readline().startswith("serving"):
                raise RuntimeError("the cloud did not start; see above.")
            me = [__file__, "--edge", f"{ADDRESSES[0]}:{PORT}", "--base", base]
            edge = network.start(1, *me, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            started.append(edge)
            yield network, edge
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait()
            network.close()


def ask(edge: subprocess.Popen, variant: dict[str, Any]) -> dict[str, Any]:
    edge.stdin.write(json.dumps(variant) + "\n")
    edge.stdin.flush()
    line = edge.stdout.readline()
    if not line:
        raise RuntimeError(f"the edge ended in {variant}; see above.")
    return json.loads(line)


def run_plain(out: str, args: argparse.Namespace) -> None:
    """What a plain socket gets of each link of the plan."""
    with tempfile.TemporaryDirectory() as folder:
        network = Network(folder)
        try:
            for link in dict.fromkeys(key[:4] for key in plan()):
                network.set(*link)
                found = [plain_tcp(network, args.seconds) for _ in range(args.steps)]
                row = {"link": link, "mbit": statistics.median(found), "all": found, "load": os.getloadavg()[0]}
                append_rows(out, [row])
                print(plain_table([row]).splitlines()[-1], flush=True)
        finally:
            network.close()


def plain_table(rows: list[dict[str, Any]]) -> str:
    """What a plain socket gets, and as a share of the rate."""
    names = ("Mbit/s", "RTT ms", "loss %", "TCP")
    return format_table(
        [
            {
                **{name: f"{v:g}" if isinstance(v, float) else v for name, v in zip(names, row["link"], strict=True)},
                "a plain socket gets": f"{row['mbit']:.1f}", "of the rate": f"{row['mbit'] / row['link'][0]:.2f}",
            }
            for row in rows
        ]
    )  # fmt: skip


def with_limits(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the shortest step that its link allows, with so many parts in flight and with any number of them."""
    key = Key(*row["key"])
    link = HomeLink(key.rate, key.rate, key.round_trip / 1000)
    phases = [Phase(*phase) for phase in row["phases"]]
    limits = {
        "limit": sum(link.seconds(phase, row["in_flight"]) for phase in phases),
        "limit_any": sum(link.seconds(phase, None) for phase in phases),
    }
    return {**row, **limits}


def run(rows: list[Key], base: str, out: str, args: argparse.Namespace) -> None:
    """Measure some rows of the plan, and just before each the same step on a link that costs nothing."""
    known = {Key(*row["key"]) for row in read_rows(out)}
    with both_ends(base) as (network, edge):
        for key in rows:
            if key in known:
                continue
            steps = 1 if key.loss and key.control == "cubic" else args.steps
            variant = {
                "placement": key.placement, "packing": key.packing, "in_flight": key.in_flight,
                "connections": key.connections, "tokens": TOKENS[key.rate], "steps": steps, "warm_up": 1,
            }  # fmt: skip
            network.set(*FREE, "cubic")
            free = ask(edge, variant)["seconds"]
            network.set(*key[:4])
            found = ask(edge, variant)
            row = with_limits(
                {
                    "key": key,
                    **variant,
                    **found,
                    "free": free,
                    "load": os.getloadavg()[0],
                    "hidden": args.hidden,
                    "layers": args.layers,
                }
            )
            append_rows(out, [row])
            print(table([row]).splitlines()[-1], flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """A line a row: what was reached of the limit."""
    lines = []
    for row in rows:
        key, seconds = Key(*row["key"]), row["seconds"]
        lines.append(
            {
                "Mbit/s": f"{key.rate:g}", "RTT ms": f"{key.round_trip:g}", "loss %": f"{key.loss:g}",
                "TCP": key.control, "placement": key.placement, "packing": key.packing, "in flight": key.in_flight,
                "connections": key.connections,
                "tokens": row["tokens"], "step s": f"{seconds:.2f}", "free s": f"{row['free']:.2f}",
                "limit s": f"{row['limit']:.2f}", "load": f"{row['load']:.0f}",
                "tokens/s": f"{row['tokens'] / seconds:.0f}",
                "of limit": f"{row['limit'] / seconds:.2f}", "of any in flight": f"{row['limit_any'] / seconds:.2f}",
            }
        )  # fmt: skip
    return format_table(lines)


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--out", help="file that gets a line a row; rows that it holds are not measured again")
    parser.add_argument("--table", help="show such a file")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="measure a plain socket instead")
    parser.add_argument("--seconds", type=float, default=6.0, help="for which a plain socket sends")
    parser.add_argument("--only", help="Python expression over the fields of Key")
    parser.add_argument("--edge", help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.table:
        rows = list(read_rows(args.table))
        print(plain_table(rows) if "link" in rows[0] else table([with_limits(row) for row in rows]))
        return
    if args.edge:
        be_edge(args.edge, args.base)
        return
    rows = [key for key in plan() if args.only is None or eval(args.only, {}, key._asdict())]
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    if args.plain:
        run_plain(args.out, args)
        return
    with tempfile.TemporaryDirectory() as base:
        save_model(base, args.hidden, args.layers)
        run(rows, base, args.out, args)


if __name__ == "__main__":
    main()
