"""One row of a schedule, compiled for execution: which heads of which branch run how."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ..partition import Partition, Subnet
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
    """Turn one row of a schedule into a plan; equal rows get the same object while it is remembered.

    Args:
        partition: The subnets.
        operations: Operation of each scheduled subnet, int [K].

    Raises:
        ValueError: If the row has another length, or a value that is no operation.
    """
    operations = np.asarray(operations)
    if operations.shape != (partition.num_scheduled,):
        raise ValueError(
            f"operations has shape {list(operations.shape)}; the partition has {partition.num_scheduled} scheduled "
            "subnets, one operation for each is needed."
        )
    row = operations.astype(np.int8)
    if (row != operations).any() or row.min() < Operation.SHORTCUT or row.max() > Operation.FULL:
        raise ValueError(f"operations={operations.tolist()} must be values of Operation: 0, 1 or 2.")
    return _layout(partition).plan(row.tobytes())


def executed_operations(partition: Partition, executed: Mapping[int, Cell | None]) -> np.ndarray:
    """The row of a schedule that was executed, int [K].

    Args:
        partition: The subnets.
        executed: What each branch did, by its index; a branch that is missing did not run.
    """
    row = np.full(partition.num_scheduled, Operation.SHORTCUT, dtype=np.int8)
    for block in _layout(partition).blocks:
        ran = next((index for index in block.branches if index in executed), None)
        if ran is not None:
            row[block.subnets] = _operations(block.heads, executed[ran])
    return row


@dataclass(frozen=True)
class _Block:
    """Where the subnets of a block stand in a row [K], what heads each of them has, and the block's branches."""

    subnets: np.ndarray
    heads: tuple[tuple[int, ...], ...]
    branches: tuple[int, ...]


class _Layout:
    """What compiling a row needs of a partition, looked up once."""

    def __init__(self, partition: Partition):
        members: dict[int, list[Subnet]] = {}
        for subnet in partition.subnets:
            members.setdefault(subnet.block, []).append(subnet)
        branches: dict[int, list[int]] = {block: [] for block in members}
        for index, branch in enumerate(partition.branches):
            branches[branch.block].append(index)
        self.blocks = [
            _Block(
                np.array([subnet.index for subnet in subnets]),
                tuple(subnet.heads for subnet in subnets),
                tuple(branches[block]),
            )
            for block, subnets in members.items()
        ]
        self.branch_heads = [branch.heads for branch in partition.branches]
        self.plan = lru_cache(maxsize=1024)(self._compile)

    def _compile(self, row: bytes) -> Plan:
        operations = np.frombuffer(row, dtype=np.int8)
        cells: list[Cell | None] = [None] * len(self.branch_heads)
        for block in self.blocks:
            cell = _cell(block.heads, operations[block.subnets].tobytes())
            for branch in block.branches:
                if len(cell.full) != self.branch_heads[branch]:
                    cells[branch] = cell
        return Plan(tuple(operations.tolist()), tuple(cells))


_LAYOUTS: dict[int, _Layout] = {}
"""By the identity of a living partition: to compare its content takes longer than to compile."""


def _layout(partition: Partition) -> _Layout:
    key = id(partition)
    if key not in _LAYOUTS:
        _LAYOUTS[key] = _Layout(partition)
        weakref.finalize(partition, _LAYOUTS.pop, key, None)
    return _LAYOUTS[key]


@lru_cache(maxsize=1 << 14)
def _cell(heads: tuple[tuple[int, ...], ...], operations: bytes) -> Cell:
    """The cell in which the subnets with these heads have these operations; blocks alike share it."""
    by_operation: dict[int, list[int]] = {operation: [] for operation in Operation}
    for members, operation in zip(heads, operations, strict=True):
        by_operation[operation].extend(members)
    full, forward_only, skipped = (
        Heads(tuple(by_operation[o])) for o in (Operation.FULL, Operation.FORWARD_ONLY, Operation.SHORTCUT)
    )
    return Cell(full, forward_only, skipped)


@lru_cache(maxsize=1 << 14)
def _operations(heads: tuple[tuple[int, ...], ...], cell: Cell | None) -> np.ndarray:
    """The operations that a cell gives to subnets with these heads, int8."""
    if cell is None:
        return np.full(len(heads), Operation.FULL, dtype=np.int8)
    by_head = dict.fromkeys(cell.full.indices, Operation.FULL)
    by_head |= dict.fromkeys(cell.forward_only.indices, Operation.FORWARD_ONLY)
    return np.array([by_head.get(members[0], Operation.SHORTCUT) for members in heads], dtype=np.int8)
