"""Cut a model into subnets: find blocks, heads and projections, and refuse what cannot be cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

from torch import nn

from ..value_checks import check, is_integer
from .branches import attention_branch, ffn_branch, has_module
from .gauges import Stack
from .partition import Branch, Partition, Subnet
from .stacks import FoundStack, find_stacks
from .whole_blocks import ASKED, boundary, partition_into_blocks


def partition_model(
    model: nn.Module,
    heads_per_subnet: int = 1,
    stacks: str | Sequence[str] | None = None,
    subnets: Literal["heads", "blocks"] | None = "heads",
) -> Partition:
    """Cut a model into subnets (arXiv 2504.12471, section 3).

    Args:
        model: The model, with or without PEFT layers in it.
        heads_per_subnet: Heads (key/value heads under grouped-query attention) that one subnet groups.
        stacks: Which stacks of blocks are cut, where there are several; see `D2FTConfig`.
        subnets: ``"heads"``, whole ``"blocks"``, or None: blocks where the model cannot be cut into heads.

    Raises:
        ValueError: If the model cannot be cut; the message says what stands in the way.
    """
    check(isinstance(model, nn.Module), "model", model, "must be a model, a torch.nn.Module")
    if subnets == "blocks":
        return partition_into_blocks(model, ASKED)
    try:
        return _cut_into_heads(model, heads_per_subnet, stacks)
    except ValueError as error:
        if subnets == "heads" or heads_per_subnet != 1 or stacks is not None:
            raise
        return partition_into_blocks(model, str(error).rstrip("."))


def _cut_into_heads(model: nn.Module, heads_per_subnet: int, stacks: str | Sequence[str] | None) -> Partition:
    branches: list[Branch] = []
    subnets: list[Subnet] = []
    blocks: list[str] = []
    cut: list[Stack] = []
    for found in find_stacks(model, stacks):
        reads = found.reads if blocks or found.reads == "states" else "inputs"  # nothing is scheduled before it
        cut.append(Stack(found.name, len(blocks), len(found.blocks), reads))
        for index, (heads, of_block) in enumerate(_branches(found, len(blocks)), start=len(blocks)):
            _check_heads_per_subnet(heads_per_subnet, heads)
            branches += of_block
            for first in range(0, heads if of_block else 0, heads_per_subnet):
                subnets.append(Subnet(len(subnets), index, tuple(range(first, first + heads_per_subnet))))
        blocks += [f"{found.name}.{number}" for number in range(len(found.blocks))]
    projections = {p.name for branch in branches for p in branch.projections}
    return Partition(
        model_type=model.config.model_type,
        branches=tuple(branches),
        subnets=tuple(subnets),
        blocks=tuple(blocks),
        boundary=tuple(boundary(model, "", projections)),
        heads_per_subnet=heads_per_subnet,
        stacks=tuple(cut),
    )


def _branches(found: FoundStack, start: int) -> list[tuple[int, list[Branch]]]:
    """Heads and branches of each block of a stack, in the order in which they run.

    A block that mixes tokens otherwise (linear attention) runs whole, and its FFN is cut as in the others.

    Args:
        found: The stack.
        start: Index of its first block in the model.
    """
    prefixes = [f"{found.name}.{number}" for number in range(len(found.blocks))]
    blocks, spec = list(zip(found.blocks, prefixes, itertools.count(start))), found.architecture  # noqa: B905
    attentions = [attention_branch(found, *one, spec.attention) for one in blocks]
    branches = []
    for (block, prefix, index), attention in zip(blocks, attentions, strict=True):
        heads = next(branch for branch in (attention, *attentions) if branch is not None).heads
        cross = spec.cross_attention
        if cross is not None:
            cross = attention_branch(found, block, prefix, index, cross, "cross_attention")
        if cross is not None and cross.heads != heads:
            raise ValueError(
                f"{prefix} cannot be cut into heads: its attention has {heads} (key/value) heads and its cross "
                f"attention {cross.heads}."
            )
        ffn = None
        if spec.ffn is not None and has_module(block, spec.ffn.row):
            ffn = ffn_branch(block, prefix, index, spec.ffn, heads)
        branches.append((heads, [branch for branch in (attention, cross, ffn) if branch is not None]))
    return branches


def _check_heads_per_subnet(heads_per_subnet: int, heads: int) -> None:
    if not is_integer(heads_per_subnet) or heads_per_subnet < 1 or heads % heads_per_subnet:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"heads_per_subnet={heads_per_subnet!r} does not divide the {heads} heads (key/value heads) of a block; "
            f"choose one of {fitting}."
        )


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model under PEFT's wrapper, whose paths the partition names."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def parts_elsewhere(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the paths of modules that run on another machine: here they have names and shapes, and no weights."""
    return tuple(f"{name}." for name, part in base_model(model).named_modules() if hasattr(part, "elsewhere"))
