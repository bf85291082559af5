"""The slow, obvious twin of the execution: a dense model with masks per head. Tests hold the fast path against it.

Every head runs forward in every layer; at the row-parallel projection of each branch the features of SHORTCUT heads are
masked out and the contribution of FORWARD_ONLY heads is detached. The model is a plain one, without D2FT's layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from d2ft_peft.partition import Branch, Partition
from d2ft_peft.schedule import Operation


@contextmanager
def reference_forward(
    model: nn.Module,
    partition: Partition,
    operations: np.ndarray,
    shortcut: str = "zero",
    means: Mapping[int, Tensor] | None = None,
) -> Iterator[None]:
    """Let a plain model, or a plain PEFT LoRA model, run under one row of a schedule.

    Args:
        model: The dense model; its forward within the context follows the row.
        partition: The subnets.
        operations: Operation of each scheduled subnet, int [K].
        shortcut: ``"zero"``, ``"mean"`` or ``"rescale"``.
        means: Mean input features [heads * width] of each branch's row-parallel projection, for ``"mean"``.
    """
    rows = []
    for index, branch in enumerate(partition.branches):
        row = model.get_submodule(branch.row.name)
        full, forward_only, skipped = _masks(partition, branch, operations)
        mean = means[index] if shortcut == "mean" else None
        row.forward = _masked_row(row, full, forward_only, skipped, shortcut, mean)
        rows.append(row)
    try:
        yield
    finally:
        for row in rows:
            del row.forward


def _masks(partition: Partition, branch: Branch, operations: np.ndarray) -> list[Tensor]:
    """One 0/1 mask over the row-parallel input features for FULL, FORWARD_ONLY and SHORTCUT."""
    masks = []
    for operation in (Operation.FULL, Operation.FORWARD_ONLY, Operation.SHORTCUT):
        parts = len(branch.row.layout.part_widths)
        heads = torch.zeros(parts, branch.heads, branch.row.layout.width)
        for subnet in partition.subnets:
            if subnet.block == branch.block and operations[subnet.index] == operation:
                heads[:, list(subnet.heads)] = 1
        masks.append(heads.flatten())
    return masks


def _masked_row(row: nn.Module, full: Tensor, forward_only: Tensor, skipped: Tensor, shortcut: str, mean):
    def dense(x: Tensor) -> Tensor:
        return type(row).forward(row, x)

    def forward(x: Tensor) -> Tensor:
        masks = [mask.to(x) for mask in (full, forward_only, skipped)]
        bias = dense(torch.zeros_like(x))
        contributions = [dense(x * mask) - bias for mask in masks[:2]]
        active = (full + forward_only).mean()
        scale = 1 / active if shortcut == "rescale" and active > 0 else 1.0
        out = contributions[0] * scale + (contributions[1] * scale).detach()
        if full.any():
            out = out + bias
        elif forward_only.any() or shortcut == "mean":
            out = out + bias.detach()
        if shortcut == "mean":
            out = out + (dense(mean.to(x) * masks[2] + torch.zeros_like(x)) - bias).detach()
        return out

    return forward
