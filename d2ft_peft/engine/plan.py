"""One row of a schedule, compiled for execution: which heads of which branch run how."""

from __future__ import annotations

from collections.abc import Mapping
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
        operations: Operation of each scheduled subnet.
        cells: One entry a branch, in the order of `Partition.branches`; None where every head is FULL.
    """

    operations: tuple[int, ...]
    cells: tuple[Cell | None, ...]

    @property
    def skipped(self) -> bool:
        """True if every subnet is SHORTCUT: the micro-batch is not to be run at all."""
        return not any(self.operations)


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
    return Plan(tuple(operations.tolist()), compiled)


def executed_operations(partition: Partition, executed: Mapping[int, Cell | None]) -> np.ndarray:
    """The row of a schedule that was executed, int [K].

    Args:
        partition: The subnets.
        executed: What each branch did, by its index; a branch that is missing did not run.
    """
    by_block: dict[int, Cell | None] = {}
    for index, cell in executed.items():
        by_block.setdefault(partition.branches[index].block, cell)
    row = np.full(partition.num_scheduled, Operation.SHORTCUT, dtype=np.int8)
    for subnet in partition.subnets:
        if subnet.block not in by_block:
            continue
        cell, head = by_block[subnet.block], subnet.heads[0]
        if cell is None or head in cell.full.indices:
            row[subnet.index] = Operation.FULL
        elif head in cell.forward_only.indices:
            row[subnet.index] = Operation.FORWARD_ONLY
    return row
