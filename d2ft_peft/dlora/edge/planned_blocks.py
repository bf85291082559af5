"""A D2FT schedule on top: what a micro-batch's plan leaves out is neither computed in the cloud nor sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...engine.intercept import find_runtime
from ...engine.plan import Cell
from .local_adapters import Alive


@dataclass(frozen=True)
class PlannedBlocks:
    """What the blocks of a span do in one pass.

    Attributes:
        skipped: Indices of blocks that only the residual stream passes (SHORTCUT of all their heads).
        constant: Indices of blocks whose contribution is a constant for autograd (FORWARD_ONLY of all their heads).
    """

    skipped: frozenset[int] = frozenset()
    constant: frozenset[int] = frozenset()

    def fields(self) -> dict[str, Any]:
        """What a request says of it."""
        named = {"skipped": sorted(self.skipped), "constant": sorted(self.constant)}
        return {name: blocks for name, blocks in named.items() if blocks}

    def of(self, alive: Alive, block_of: dict[str, int]) -> Alive:
        """The adapters that are left, and those among them that still learn."""
        runs = [name for name in (*alive.exchanged, *alive.copied) if block_of[name] not in self.skipped]
        left = frozenset(runs)
        return Alive(
            tuple(name for name in alive.trained if name in left and block_of[name] not in self.constant),
            tuple(name for name in alive.exchanged if name in left),
            tuple(name for name in alive.copied if name in left),
        )


def planned_blocks(model: nn.Module, span: range, samples: int, tokens: int) -> PlannedBlocks:
    """What the current plan of a model asks of a span, noted as executed.

    Args:
        model: The model that was adapted by PEFT; without a D2FT adapter, or outside of a plan, everything runs.
        span: Indices of the span's blocks.
        samples, tokens: Size of the pass.

    Raises:
        ValueError: If the plan gives heads of one block different operations.
    """
    runtime = find_runtime(model)
    if runtime is None or runtime.plan is None or not runtime.trains:
        return PlannedBlocks()
    if runtime.shortcut != "zero":
        raise ValueError(
            f"shortcut={runtime.shortcut!r}: a block that the cloud skips adds nothing; use shortcut='zero'."
        )
    (partition,) = runtime.partitions.values()
    skipped, constant = set(), set()
    for index, branch in enumerate(partition.branches):
        if branch.block not in span:
            continue
        cell = runtime.plan.cells[index]
        runtime.executed[index] = cell
        if index == 0:
            runtime.passes.append((samples, tokens))
        if cell is not None:
            _sort(cell, branch.block, skipped, constant)
    return PlannedBlocks(frozenset(skipped), frozenset(constant))


def _sort(cell: Cell, block: int, skipped: set[int], constant: set[int]) -> None:
    if not cell.num_active:
        skipped.add(block)
    elif len(cell.forward_only) == cell.num_heads:
        constant.add(block)
    else:
        raise ValueError(
            f"the schedule gives heads of block {block} different operations, and the cloud runs whole blocks; use a "
            "policy over samples or blocks (fewer_samples, importance, depth, stochastic_depth, lisa, drop_bp, ...)."
        )
