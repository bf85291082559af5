"""What the processes of a distributed run tell each other about a step: small arrays of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel


def world_size() -> int:
    """Number of processes of the run; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 without torch.distributed."""
    return dist.get_rank() if world_size() > 1 else 0


MEETING = "_d2ft_processes_meet"
"""Attribute of a model in whose passes processes meet, though its modules do not show it (DeepSpeed)."""


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters, or their gradients, are shared out (FSDP, DeepSpeed's ZeRO), so that the processes meet in
    every pass through a model."""
    sharded = any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())
    return sharded or getattr(model, MEETING, False)


def gather(values: np.ndarray) -> np.ndarray:
    """Values of all processes, one row for each."""
    everyone = np.zeros((world_size(), *values.shape))
    everyone[rank()] = values
    return all_reduce(everyone)


def all_reduce(values: np.ndarray, operation: Any = None) -> np.ndarray:
    """Sum (by default) over all processes, the same bits on each; on the host, so that no device is waited for."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)  # a copy: the sum is made in place
    dist.all_reduce(tensor, operation or dist.ReduceOp.SUM, _host_group())
    return tensor.numpy()


def mean_over_processes(*values: float) -> np.ndarray:
    """Means of some numbers over the processes, the same bits on each."""
    return all_reduce(np.array(values, dtype=float)) / world_size()


def broadcast(values: np.ndarray, source: int) -> np.ndarray:
    """Values of one process on all of them, of any type; the others give an array of the same shape."""
    if world_size() == 1:
        return values
    tensor = torch.from_numpy(np.array(values))
    dist.broadcast(tensor, source, _host_group())
    return tensor.numpy()


_host_groups: dict[Any, Any] = {}


def _host_group() -> Any:
    """A group of all processes whose messages are numbers on the host; None where the default one's are."""
    default = dist.group.WORLD
    if default not in _host_groups:
        _host_groups.clear()  # of process groups that are gone
        on_host = "cpu:" in dist.get_backend_config()
        _host_groups[default] = None if on_host else dist.new_group(backend="gloo")
    return _host_groups[default]
