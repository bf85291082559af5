"""One row of a schedule, compiled for execution: which heads of which branch run how."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ..partition import Partition
from ..schedule import Operation


@dataclass(frozen=True)
class Heads:
    """Some heads of a branch, in the order in which their features are laid out.

    Attributes:
        indices: Indices of the heads.
    """

    indices: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def start(self) -> int | None:
        """First head if the heads are consecutive and ascending, so that a view holds their features."""
        first = self.indices[0] if self.indices else 0
        return first if self.indices == tuple(range(first, first + len(self.indices))) else None

    def index(self, device: torch.device) -> torch.Tensor:
        """The indices as a tensor, int64 [len(self)], on `device`."""
        return _index(self.indices, device)


@lru_cache(maxsize=4096)
def _index(indices: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(indices, device=device)


@dataclass(frozen=True)
class Cell:
    """What one branch of one block does with one micro-batch.

    Attributes:
        full: Heads that run forward and backward.
        forward_only: Heads that run forward; their output is a constant for autograd.
        skipped: Heads that do not run.
    """

    full: Heads
    forward_only: Heads
    skipped: Heads

    @property
    def num_heads(self) -> int:
        """All heads of the branch."""
        return self.num_active + len(self.skipped)

    @property
    def num_active(self) -> int:
        """Heads that run."""
        return len(self.full) + len(self.forward_only)


@dataclass(frozen=True)
class Plan:
    """One micro-batch's operations for every branch.

    Attributes:
        cells: One entry a branch, in the order of `Partition.branches`; None where every head is FULL.
        skipped: True if every subnet is SHORTCUT: the micro-batch is not to be run at all.
    """

    cells: tuple[Cell | None, ...]
    skipped: bool = False


def compile_plan(partition: Partition, operations: np.ndarray) -> Plan:
    """Turn one row of a schedule into a plan.

    Args:
        partition: The subnets.
        operations: Operation of each scheduled subnet, int [K].
    """
    operations = np.asarray(operations)
    if operations.shape != (partition.num_scheduled,):
        raise ValueError(
            f"operations has shape {list(operations.shape)}; the partition has {partition.num_scheduled} scheduled "
            "subnets, one operation for each is needed."
        )
    by_block: dict[int, dict[int, list[int]]] = {}
    for subnet, operation in zip(partition.subnets, operations.tolist(), strict=True):
        block = by_block.setdefault(subnet.block, {operation: [] for operation in Operation})
        block[operation].extend(subnet.heads)
    cells = {
        block: Cell(*(Heads(tuple(heads[o])) for o in (Operation.FULL, Operation.FORWARD_ONLY, Operation.SHORTCUT)))
        for block, heads in by_block.items()
    }
    compiled = tuple(
        None if len(cells[branch.block].full) == branch.heads else cells[branch.block] for branch in partition.branches
    )
    return Plan(compiled, skipped=bool((operations == Operation.SHORTCUT).all()))
