"""What the processes of a distributed run tell each other about a step: small arrays of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of processes of the run; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 without torch.distributed."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(values: np.ndarray) -> np.ndarray:
    """Values of all processes, one row for each."""
    everyone = np.zeros((world_size(), *values.shape))
    everyone[rank()] = values
    return all_reduce(everyone)


def all_reduce(values: np.ndarray, operation: Any = None) -> np.ndarray:
    """Sum (by default) over all processes, the same bits on each."""
    if world_size() == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(values, dtype=torch.float64, device=device)  # a copy: the sum is made in place
    dist.all_reduce(tensor, operation or dist.ReduceOp.SUM)
    return tensor.cpu().numpy()


def gather_samples(indices: np.ndarray, values: dict[Any, np.ndarray]) -> tuple[np.ndarray, dict[Any, np.ndarray]]:
    """Samples and their scores, by any key, from all processes; some may have fewer."""
    if world_size() == 1:
        return indices, values
    rows = np.stack([indices.astype(np.float64), *values.values()])
    length = int(all_reduce(np.array([rows.shape[1]], dtype=float), dist.ReduceOp.MAX)[0])
    if length == 0:
        return indices, values
    padded = np.full((len(rows), length), np.nan)
    padded[:, : rows.shape[1]] = rows
    rows = np.concatenate(list(gather(np.nan_to_num(padded, nan=-1.0))), axis=1)
    rows = rows[:, rows[0] >= 0]
    return rows[0].astype(np.int64), dict(zip(values, rows[1:], strict=True))
