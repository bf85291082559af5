"""Run a function of a test module in several gloo processes and collect what each returns.

The processes are forked off one that has imported the package: importing torch, transformers and peft anew in each took
longer than most of the tests.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import socket
import time
from pathlib import Path

import torch


ROOT = Path(__file__).parents[2]
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["d2ft_peft", "tests.models"])


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _call(environment: dict[str, str], module: str, function: str, out: Path, args: tuple[str, ...]) -> None:
    """What a process does; all that it prints goes to a file."""
    with out.with_suffix(".log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(ROOT)
    os.environ.update(environment)
    torch.set_num_threads(1)
    gc.freeze()  # the Trainer collects garbage in every run; what all processes imported is none
    torch.save(getattr(importlib.import_module(module), function)(*args), out)


def run(module: str, function: str, tmp_path: Path, *args: str, processes: int = 2, timeout: float = 120) -> list:
    """Call ``module.function(*args)`` in every process; its results, by rank.

    Raises:
        RuntimeError: With what a process printed, if one fails or all take longer than `timeout` seconds.
    """
    port, started = free_port(), []
    outs = [tmp_path / f"rank{rank}.pt" for rank in range(processes)]
    for rank, out in enumerate(outs):
        out.with_suffix(".log").touch()
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        process = FORKSERVER.Process(target=_call, args=(environment, module, function, out, args))
        process.start()
        started.append(process)
    deadline = time.monotonic() + timeout
    try:
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        if any(process.is_alive() for process in started):
            raise RuntimeError(f"{module}.{function} took longer than {timeout} s in {processes} processes")
    finally:
        for process in started:
            process.kill()
    for rank, (process, out) in enumerate(zip(started, outs, strict=True)):
        if process.exitcode:
            said = out.with_suffix(".log").read_text()[-4000:]
            raise RuntimeError(f"rank {rank} of {module}.{function} failed:\n{said}")
    return [torch.load(out, weights_only=True) for out in outs]
