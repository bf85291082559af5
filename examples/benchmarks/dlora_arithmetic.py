"""What DLoRA costs at 7B and 70B: bytes, FLOPs, memory and seconds by placement; and a count of what a real run moves.

    python examples/benchmarks/dlora_arithmetic.py --png docs/images/dlora_bytes.png
    python examples/benchmarks/dlora_arithmetic.py --count --out examples/benchmarks/results/dlora/counted.jsonl

The first prints what `d2ft_peft.simulate.dlora_step` foresees; nothing is trained. The second trains a step of a small
random Llama across a real cloud with all adapters of q and v alive and with those of an eighth of the blocks, counts
the bytes of all frames and the FLOPs of the edge's threads, and holds them against the same formulas.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from rows import append_rows, command_line, pyplot, save
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from d2ft_peft.costs import flop_counter
from d2ft_peft.dlora import BaseModel, Cloud, connect
from d2ft_peft.report import format_table
from d2ft_peft.simulate.dlora_step import (
    LLAMA_7B,
    LLAMA_70B,
    HomeLink,
    LlamaShape,
    Placement,
    crossing,
    edge_flops,
    edge_memory,
)


LINKS = {"50/10": HomeLink(10, 50, 0.02), "250/40": HomeLink(40, 250, 0.02), "1000/1000": HomeLink(1000, 1000, 0.02)}
"""Mbit/s down and up, 20 ms to the cloud and back."""

TOKENS, LENGTH, IN_FLIGHT = 4096, 512, 8
QV = ("q_proj", "v_proj")


def placements(shape: LlamaShape) -> dict[str, Placement]:
    """The rows of the table; adapters on q and v."""
    everything = [(block, name) for block in range(shape.depth) for name in QV]
    eighth = [(block, name) for block in range(0, shape.depth, 8) for name in QV]
    paper = Placement(everything, packing="bf16")
    return {
        "paper's, all modules": paper,
        "paper's, 1/8": replace(paper, alive=eighth),
        "paper's, 1/8, int8": replace(paper, alive=eighth, packing="int8"),
        "paper's, 1/8, int8, head in the cloud": replace(paper, alive=eighth, packing="int8", head_in_cloud=True),
        "U-shaped, a block at each end": Placement([], edge_blocks=(1, 1), trains_below=True, packing="bf16"),
        "U-shaped, int8": Placement([], edge_blocks=(1, 1), trains_below=True, packing="int8"),
        "last block only, int8": Placement([], edge_blocks=(0, 1), packing="int8"),
        "cores r = 16, all, bf16": replace(paper, rank=16, core=True),
        "cores r = 16, all, int8": replace(paper, rank=16, core=True, packing="int8"),
        "cores r = 16, all, int8, head in the cloud": Placement(
            everything, rank=16, core=True, packing="int8", head_in_cloud=True
        ),
    }


def bytes_of(shape: LlamaShape, placement: Placement) -> float:
    """Bytes per token, both directions, forward and backward."""
    return sum(phase.up + phase.down for phase in crossing(shape, placement))


def seconds_of(shape: LlamaShape, placement: Placement, link: HomeLink) -> float:
    """What the link takes of a step of `TOKENS` tokens."""
    return sum(link.seconds(phase.times(TOKENS), IN_FLIGHT) for phase in crossing(shape, placement))


def table(shape: LlamaShape) -> str:
    """A line a placement."""
    lines, whole = [], None
    for name, placement in placements(shape).items():
        phases, total = crossing(shape, placement), bytes_of(shape, placement)
        work, memory = edge_flops(shape, placement, LENGTH), edge_memory(shape, placement, TOKENS // IN_FLIGHT)
        whole = whole or total
        line = {
            "placement": name, "kB per token": f"{total / 1000:.1f}", "of the first": f"1/{whole / total:.1f}",
            "trips": sum(phase.trips for phase in phases), "edge MFLOP per token": f"{work.total / 1e6:.0f}",
            "of them head": f"{work.head / 1e6:.0f}", "adapters": f"{work.adapters / 1e6:.2f}",
            "edge GB": f"{memory.total / 1e9:.2f}",
        }  # fmt: skip
        for link_name, link in LINKS.items():
            seconds = seconds_of(shape, placement, link)
            line[link_name] = f"{seconds:.3g} s, {TOKENS / seconds:.3g} tok/s"
        lines.append(line)
    return format_table(lines)


def plot(path: str) -> None:
    """Bytes per token by placement, 7B and 70B."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 4.5))
    for offset, (name, shape) in enumerate({"7B": LLAMA_7B, "70B": LLAMA_70B}.items()):
        rows = placements(shape)
        places = [-number - 0.38 * offset for number in range(len(rows))]
        values = [bytes_of(shape, placement) / 1000 for placement in rows.values()]
        axis.barh(places, values, height=0.36, color=f"C{offset}", label=name)
        for place, value in zip(places, values, strict=True):
            axis.text(value * 1.1, place, f"{value:,.0f}" if value > 100 else f"{value:.1f}", va="center", fontsize=7)
    axis.set_yticks([-number - 0.19 for number in range(len(rows))], list(rows), fontsize=8)
    axis.set_xscale("log")
    axis.set_xlim(5, 20_000)
    axis.set_xlabel("kB that cross for a token of training, both directions, forward and backward", fontsize=8)
    axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    save(figure, path)


# ---------------------------------------------------------------- counted


def tiny_llama(depth: int, width: int) -> LlamaForCausalLM:
    """A random Llama with the proportions of the 7B: vocabulary and FFN by width."""
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=depth, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=width * 125 // 16, max_position_embeddings=512,
        )
    )  # fmt: skip


def shape_of(config: Any) -> LlamaShape:
    """Sizes of a Llama's configuration."""
    keys = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return LlamaShape(config.num_hidden_layers, config.hidden_size, keys, config.intermediate_size, config.vocab_size)


class _NoModules(contextlib.nullcontext):
    """Tells the counter of no module but the whole."""

    parents = frozenset({"Global"})


def count(address: str, base: str, shape: LlamaShape, placement: Placement, rows: int, length: int) -> dict[str, Any]:
    """Bytes and edge FLOPs of one training step, counted and foreseen."""
    set_seed(0)
    names = sorted({name for _, name in placement.alive}) or list(QV)
    outside = {} if placement.alive else {"layers_to_transform": [0, shape.depth - 1]}
    model = connect(
        address, base, LoraConfig(r=placement.rank, target_modules=names, **outside),
        edge_blocks=placement.edge_blocks, head="cloud" if placement.head_in_cloud else "edge",
        crossing="core" if placement.core else "hidden", packing=placement.packing, dtype=torch.float32,
    )  # fmt: skip
    for path, layer in model.remote_span.adapters.layers.items():
        parts = path.split(".")
        layer.requires_grad_((int(parts[-3]), parts[-1]) in set(placement.alive))
    ids = torch.randint(0, shape.vocabulary, (rows, length))
    traffic, tokens = model.remote_span.link.traffic, rows * length
    sent, received = traffic.sent, traffic.received
    counter = flop_counter()
    counter.mod_tracker = _NoModules()  # its hooks do not bear that adapters run their backward pass within another
    with counter:
        model(input_ids=ids, labels=ids).loss.backward()
    sent, received = traffic.sent - sent, traffic.received - received
    trips = traffic.round_trips
    model.disconnect()
    forward, backward = crossing(shape, placement)
    return {
        "sent": sent, "received": received, "sent_foreseen": (forward.up + backward.up) * tokens,
        "received_foreseen": (forward.down + backward.down) * tokens, "round_trips": trips, "tokens": tokens,
        "flops": counter.get_total_flops(), "flops_foreseen": edge_flops(shape, placement, length).total * tokens,
    }  # fmt: skip


def counted_placements(depth: int) -> dict[str, Placement]:
    """The placements of the count: float32 crosses as it is."""
    everything = [(block, name) for block in range(depth) for name in QV]
    eighth = [(block, name) for block in range(depth // 2, depth, 8) for name in QV]
    paper = Placement(everything, number_bytes=4)
    return {
        "all": paper,
        "eighth": replace(paper, alive=eighth),
        "all, head in the cloud": replace(paper, head_in_cloud=True),
        "eighth, head in the cloud": replace(paper, alive=eighth, head_in_cloud=True),
        "all, bf16": replace(paper, packing="bf16"),
        "cores r = 4, int8": replace(paper, rank=4, core=True, packing="int8"),
        "U-shaped": Placement([], edge_blocks=(1, 1), trains_below=True, number_bytes=4),
    }


def counted(width: int, rows: int, length: int, depth: int = 8) -> list[dict[str, Any]]:
    """Count all placements on one cloud."""
    model = tiny_llama(depth, width)
    shape = shape_of(model.config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        cloud = Cloud(BaseModel.load(folder, torch.float32))
        port = cloud.start()
        try:
            return [
                {"placement": name, "width": width, **count(f"localhost:{port}", folder, shape, p, rows, length)}
                for name, p in counted_placements(shape.depth).items()
            ]
        finally:
            cloud.stop()


def counted_table(rows: list[dict[str, Any]]) -> str:
    """Counted, foreseen, and what is saved against all modules."""
    by_name, lines = {row["placement"]: row for row in rows}, []
    for row in rows:
        total, foreseen = row["sent"] + row["received"], row["sent_foreseen"] + row["received_foreseen"]
        whole = by_name["all, head in the cloud" if row["placement"].endswith("cloud") else "all"]
        in_and_out = (2 if row["placement"].endswith("cloud") else 3) * 4 * row["width"] * row["tokens"]
        lines.append(
            {
                "placement": row["placement"], "bytes": total, "foreseen": int(foreseen),
                "bytes saved": f"{1 - total / (whole['sent'] + whole['received']):.1%}",
                "in the exchanges": f"{1 - (total - in_and_out) / (whole['sent'] + whole['received'] - in_and_out):.1%}"
                if row["placement"].startswith("eighth") else "",
                "edge FLOPs": row["flops"], "FLOPs foreseen": int(row["flops_foreseen"]),
                "FLOPs saved": f"{1 - row['flops'] / whole['flops']:.1%}",
            }
        )  # fmt: skip
    return format_table(lines)


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--count", action="store_true", help="count a real run instead")
    parser.add_argument("--out", help="file that gets a line a counted placement")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--png", help="picture of bytes per token")
    args = parser.parse_args(argv)
    if args.count:
        torch.set_num_threads(1)
        rows = counted(args.width, args.rows, args.length)
        if args.out:
            append_rows(args.out, rows)
        print(counted_table(rows))
        return
    for name, shape in {"7B": LLAMA_7B, "70B": LLAMA_70B}.items():
        print(f"{name}\n\n{table(shape)}\n")
    if args.png:
        plot(args.png)


if __name__ == "__main__":
    main()
