"""Memory of each process while it loads a model head-parallel, for several numbers of processes.

    python examples/benchmarks/head_parallel_memory.py               # a Llama shape of 162 M parameters, LoRA

Writes a model with random weights to a temporary folder and starts 1, 2 and 4 processes that load it: whole, before
`HeadParallel` cuts it, and by `load_head_parallel`, of which each process reads its own heads. Peak memory is the
highest resident memory (``VmRSS``, read every millisecond) over that before loading, until every parameter was read
once; pages of the checkpoint that are mapped into memory count. On one process there is nothing to cut.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time

import torch
import transformers as tf
from accelerate import PartialState
from peft import get_peft_model
from rows import command_line

from d2ft_peft import D2FTConfig
from d2ft_peft.head_parallel import HeadParallel, load_head_parallel


MIB = 2**20


def resident() -> int:
    """Bytes of memory that this process has now."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


class Peak(threading.Thread):
    """Watches the memory of this process while a block runs."""

    def __enter__(self) -> Peak:
        self.first = self.highest = resident()
        self._over = threading.Event()
        self.start()
        return self

    def run(self) -> None:
        while not self._over.wait(0.001):
            self.highest = max(self.highest, resident())

    def __exit__(self, *_) -> None:
        self._over.set()
        self.join()
        self.highest = max(self.highest, resident())

    @property
    def mib(self) -> float:
        return (self.highest - self.first) / MIB


def load(folder: str, how: str) -> dict[str, float]:
    """Load on this process, and cut; peak memory and bytes of parameters, in MiB, and seconds."""
    state = PartialState(cpu=True)
    alone = state.num_processes == 1
    config = D2FTConfig(head_parallel=not alone, r=8)
    tf.set_seed(0)
    begin = time.perf_counter()
    with Peak(daemon=True) as peak:
        if how == "parts":
            model = load_head_parallel(tf.LlamaForCausalLM, folder, config)
        else:
            model = get_peft_model(tf.LlamaForCausalLM.from_pretrained(folder), config)
        if not alone:
            HeadParallel(model)
        for parameter in model.parameters():
            parameter.sum()  # a mapped page is in memory once it was read
    seconds = time.perf_counter() - begin
    held = sum(p.nbytes for p in model.parameters()) / MIB
    state.destroy_process_group()
    return {"peak": peak.mib, "held": held, "seconds": seconds}


def start(folder: str, processes: int, how: str) -> list[dict[str, float]]:
    """What every process reports."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), __file__]
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--folder", folder, "--how", how], check=True, env=environment, capture_output=True)
    reports = []
    for rank in range(processes):
        with open(os.path.join(folder, f"{rank}.json")) as file:
            reports.append(json.load(file))
    return reports


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # of the processes that this one starts
    parser.add_argument("--how", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        report = load(args.folder, args.how)
        with open(os.path.join(args.folder, f"{os.environ['RANK']}.json"), "w") as file:
            json.dump(report, file)
        return
    config = tf.LlamaConfig(
        hidden_size=args.hidden, intermediate_size=11 * args.hidden // 4, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.heads, vocab_size=args.vocabulary,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = tf.LlamaForCausalLM(config).to(torch.float32)
        model.save_pretrained(folder)
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, largest of all processes\n")
        del model
        print("| processes | loaded | peak, MiB | parameters held, MiB | seconds |\n| --: | :-- | --: | --: | --: |")
        for processes, how in ((1, "whole"), (2, "whole"), (2, "parts"), (4, "whole"), (4, "parts")):
            reports = start(folder, processes, how)
            peak, held, seconds = (max(report[key] for report in reports) for key in ("peak", "held", "seconds"))
            print(f"| {processes} | {how} | {peak:,.0f} | {held:,.0f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
