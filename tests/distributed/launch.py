"""Run a function of a test module in several gloo processes and collect what each returns."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch


ROOT = Path(__file__).parents[2]
_PROGRAM = """
import importlib, sys, torch
module, function, out = sys.argv[1:4]
torch.save(getattr(importlib.import_module(module), function)(*sys.argv[4:]), out)
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run(module: str, function: str, tmp_path: Path, *args: str, processes: int = 2, timeout: float = 120) -> list:
    """Call ``module.function(*args)`` in every process; its results, by rank.

    Raises:
        RuntimeError: With what a process printed, if one fails or all take longer than `timeout` seconds.
    """
    port, started = free_port(), []
    for rank in range(processes):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        command = [sys.executable, "-c", _PROGRAM, module, function, str(tmp_path / f"rank{rank}.pt"), *args]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipes))
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{module}.{function} took longer than {timeout} s in {processes} processes") from error
    finally:
        for process in started:
            process.kill()
    for rank, process in enumerate(started):
        if process.returncode:
            raise RuntimeError(f"rank {rank} of {module}.{function} failed:\n{outputs[rank][-4000:]}")
    return [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]
