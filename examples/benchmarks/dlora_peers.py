"""DLoRA's placements beside other ways to fine-tune with a cloud: bytes, round trips, time, memory of the edge, loss.

    python examples/benchmarks/dlora_peers.py --assets ASSETS --out examples/benchmarks/results/dlora/peers.jsonl
    python examples/benchmarks/dlora_peers.py --memory --out examples/benchmarks/results/dlora/memory.jsonl
    python examples/benchmarks/dlora_peers.py --table examples/benchmarks/results/dlora/peers.jsonl

The small pre-trained Llama stories260k on Shakespeare; the same batches in the same order in every row, AdamW, linear
decay, rank 8 on all projections. Cloud and edge are two processes over the loopback device. ``shipped`` is
federated learning with one edge: the whole model trains on the edge, and after every round the adapter goes up and
comes down as a safetensors file. ``prompt`` is what Petals offers: the edge owns prompt embeddings before the first
block, and every pass crosses twice. ``--memory`` instead loads a random Llama of about half a billion parameters, and
shows the edge's peak of resident memory against loading all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from dlora_load import cloud
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from rows import append_rows, command_line, read_rows
from safetensors.torch import save
from tasks import Task, load_task
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup, set_seed

from d2ft_peft.dlora import KillRevive, connect
from d2ft_peft.report import format_table


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTH, BATCH, ROUND, WARMUP, PROMPT, EIGHTH = 64, 8, 25, 10, 16, 4
UP, DOWN, ROUND_TRIP = 10, 50, 0.02
"""A home link: Mbit/s to the cloud and from it, seconds."""

# Learning rate, rank, options of connect (None: no cloud), blocks with adapters (None: all).
ROWS: dict[str, tuple[float, int, dict[str, Any] | None, list[int] | None]] = {
    "local": (1.2e-2, 8, None, None),
    "paper's placement": (1.2e-2, 8, {}, None),
    "paper's, bf16": (1.2e-2, 8, {"packing": "bf16"}, None),
    "paper's, KR 1/8": (1.2e-2, 8, {}, None),
    "paper's, KR 1/8, int8": (1.2e-2, 8, {"packing": "int8"}, None),
    "core r = 16, int8": (2.4e-2, 16, {"crossing": "core", "packing": "int8"}, None),
    "core r = 16, int8, head in the cloud": (
        2.4e-2, 16, {"crossing": "core", "packing": "int8", "head": "cloud"}, None
    ),
    "U-shaped, (1, 1)": (1.2e-2, 8, {"edge_blocks": (1, 1)}, [0, 4]),
    "U-shaped, (1, 1), int8": (1.2e-2, 8, {"edge_blocks": (1, 1), "packing": "int8"}, [0, 4]),
    "last block, (0, 1)": (1.2e-2, 8, {"edge_blocks": (0, 1)}, [4]),
    "prompt": (3e-2, 8, {}, None),
    "shipped": (1.2e-2, 8, None, None),
}  # fmt: skip


class Prompted(nn.Module):
    """Trains embeddings before the text, and nothing else.

    Args:
        model: The model across the link.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.requires_grad_(False)
        table = model.get_input_embeddings().weight
        self.prompt = nn.Parameter(table[torch.randint(0, len(table), (PROMPT,))].clone())

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        rows = input_ids.shape[0]
        text = self.model.get_input_embeddings()(input_ids)
        before = self.prompt.expand(rows, -1, -1)
        return self.model(
            inputs_embeds=torch.cat([before, text], 1),
            labels=torch.cat([labels.new_full((rows, PROMPT), -100), labels], 1),
        )


def measure(name: str, address: str, assets: str, steps: int) -> dict[str, Any]:
    """Train one row, and test it."""
    rate, rank, link, blocks = ROWS[name]
    task = load_task("shakespeare", assets, LENGTH, None, 400)
    base = str(Path(assets) / "models" / "stories260k-llama")
    set_seed(0)
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=PROJECTIONS, layers_to_transform=blocks)
    if link is None:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    else:
        model = connect(address, base, config, **link)
    owner = model
    if name == "prompt":
        model = Prompted(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, steps)
    kill_revive = None
    if "KR" in name:
        kill_revive = KillRevive(model, optimizer, active=EIGHTH, interval=max(1, steps // 20), idle="last", seed=0)
    shipped, trips, order, queue = 0, 0, torch.Generator().manual_seed(0), []
    model.train()
    begun = time.perf_counter()
    for step in range(steps):
        if len(queue) < BATCH:
            queue = torch.randperm(len(task.train), generator=order).tolist()
        chosen, queue = queue[:BATCH], queue[BATCH:]
        batch = task.collate([task.train[i] for i in chosen])
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        optimizer.step()
        schedule.step()
        if kill_revive is not None:
            kill_revive.step()
        optimizer.zero_grad()
        if name == "shipped" and (step + 1) % ROUND == 0:
            shipped, trips = shipped + len(save(get_peft_model_state_dict(model))), trips + 1
    seconds = time.perf_counter() - begun
    if kill_revive is not None:
        kill_revive.close()
    sent = received = shipped
    if link is not None:
        traffic = owner.remote_span.link.traffic
        sent, received, trips = traffic.sent, traffic.received, traffic.round_trips
    return {
        "row": name, "lr": rate, "steps": steps, "sent": sent, "received": received, "trips": trips,
        "seconds": seconds, "parameters": sum(p.numel() for p in parameters), "loss": evaluate(model, task),
        "edge_bytes": storage_bytes(model),
    }  # fmt: skip


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> float:
    """Mean loss per token on the test text."""
    model.eval()
    parts = [task.test[start : start + 100] for start in range(0, len(task.test), 100)]
    return sum(model(**task.collate(part)).loss.item() * len(part) for part in parts) / len(task.test)


def storage_bytes(model: nn.Module) -> int:
    """Memory of all parameters and buffers, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak() -> int:
    """Most bytes of resident memory of this program so far; `getrusage` would include its parent's before the fork."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


# ---------------------------------------------------------------- memory of loading


LARGE = LlamaConfig(
    hidden_size=1536, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=12, num_key_value_heads=12,
    vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip


def load_part(way: str, address: str, base: str) -> dict[str, Any]:
    """Load a part of a model, or all of it; train one step of 128 tokens."""
    before = peak()
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(0)
    if way == "whole":
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    else:
        a, b = map(int, way.split(","))
        model = connect(address, base, config, edge_blocks=(a, b), dtype=torch.float32)
    loaded = peak()
    ids = torch.randint(0, LARGE.vocab_size, (1, 128))
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    return {
        "way": way, "before": before, "loaded": loaded, "trained": peak(), "tensors": storage_bytes(model),
        "checkpoint": (Path(base) / "model.safetensors").stat().st_size,
    }  # fmt: skip


def memory_table(rows: list[dict[str, Any]]) -> str:
    """Peaks above what the libraries take."""
    return format_table(
        [
            {
                "edge owns": row["way"], "tensors MB": f"{row['tensors'] / 1e6:.0f}",
                "libraries MB": f"{row['before'] / 1e6:.0f}",
                "loading adds MB": f"{(row['loaded'] - row['before']) / 1e6:.0f}",
                "a step adds MB": f"{(row['trained'] - row['loaded']) / 1e6:.0f}",
                "checkpoint MB": f"{row['checkpoint'] / 1e6:.0f}",
            }
            for row in rows
        ]
    )  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """A line a row, with what the bytes and trips would take on a home link, computation left out."""
    first, lines = rows[0], []
    for row in rows:
        wait = 8e-6 * (row["sent"] / UP + row["received"] / DOWN) + row["trips"] * ROUND_TRIP
        lines.append(
            {
                "row": row["row"], "MB up": f"{row['sent'] / 1e6:.2f}", "MB down": f"{row['received'] / 1e6:.2f}",
                "round trips": row["trips"], "seconds": f"{row['seconds']:.1f}",
                f"s on {DOWN}/{UP}": f"{wait:.0f}", "trained": row["parameters"],
                "edge tensors kB": f"{row['edge_bytes'] / 1e3:.0f}",
                "loss": f"{row['loss']:.3f}",
                "against local": f"{row['loss'] - first['loss']:+.3f}",
            }
        )  # fmt: skip
    return format_table(lines)


def in_a_process(arguments: list[str]) -> dict[str, Any]:
    """A row measured in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as base:
        set_seed(0)
        LlamaForCausalLM(LARGE).save_pretrained(base)
        with cloud(base) as address:
            ways = ["whole", "1,1", "0,0"]
            return [in_a_process(["--way", way, "--address", address, "--base", base]) for way in ways]


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--assets", help="folder with models/ and data/")
    parser.add_argument("--out", help="file that gets a line a row")
    parser.add_argument("--table", help="show such a file")
    parser.add_argument("--memory", action="store_true", help="memory of loading instead")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--steps", type=int, default=200)
    for name in ("--row", "--way", "--address", "--base"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.table:
        rows = list(read_rows(args.table))
        print(memory_table(rows) if "way" in rows[0] else table(rows))
    elif args.row:
        print(json.dumps(measure(args.row, args.address, args.assets, args.steps)))
    elif args.way:
        print(json.dumps(load_part(args.way, args.address, args.base)))
    elif args.memory:
        rows = run_memory(args)
        append_rows(args.out, rows)
        print(memory_table(rows))
    else:
        rows = []
        with cloud(str(Path(args.assets) / "models" / "stories260k-llama")) as address:
            for name in args.rows:
                given = ["--row", name, "--address", address, "--assets", args.assets, "--steps", str(args.steps)]
                rows.append(in_a_process(given))
                append_rows(args.out, rows[-1:])
                print(f"{name}: {rows[-1]['loss']:.3f} in {rows[-1]['seconds']:.0f} s", flush=True)
        print(table(rows))


if __name__ == "__main__":
    main()
