"""What the subnets of a model are under a configuration, and which of its modules an adapter targets by default."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterable, Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..partition import (
    Partition,
    is_linear_like,
    modules_with_weights,
    partition_into_blocks,
    partition_model,
    unwrap,
)
from .adapter_checks import check_weights, why_not_sliced
from .config import D2FTConfig
from .config_checks import check_whole_blocks


def partition_for(model: nn.Module, config: D2FTConfig, other: Partition | None = None) -> Partition:
    """Partition a model as a configuration asks for, into heads or, where these cannot be cut, into whole blocks.

    Args:
        model: The model.
        config: The adapter's configuration.
        other: Partition of an adapter that the model has already.

    Raises:
        ValueError: If the model has neither heads nor blocks, the configuration asks for what they cannot do, or its
            weights cannot be trained.
    """
    if other is not None and not other.cuts_heads:
        partition = other
    else:
        partition = partition_model(model, config.heads_per_subnet, config.stacks, config.subnets)
        why = (
            why_not_sliced(model, partition, config, dequantize=False)
            if config.subnets is None and config.heads_per_subnet == 1
            else ""
        )
        if why and config.is_lora:
            partition = partition_into_blocks(model, why)
    if other is not None and partition.cuts_heads != other.cuts_heads:
        raise ValueError(
            f"subnets={config.subnets!r} makes {'heads' if partition.cuts_heads else 'blocks'} the subnets, which are "
            f"{'heads' if other.cuts_heads else 'blocks'} for the adapters that the model has; set subnets alike."
        )
    if not partition.cuts_heads:
        check_whole_blocks(config, f"whole blocks are the subnets: {partition.why_whole}")
    check_weights(model, partition, config)
    if partition.cuts_heads or config.subnets is not None or other is not None or config.inference_mode:
        return partition
    if partition.is_one_subnet:
        warnings.warn(
            f"{partition.blocks[0] or 'the model'} is the only subnet, because heads cannot be cut: "
            f"{partition.why_whole}. Policies over samples are as exact as ever, and others have nothing to choose "
            "among; subnets='blocks' says that you know.",
            stacklevel=2,
        )
    else:
        warnings.warn(
            f"the subnets are the {len(partition.blocks)} whole blocks from {partition.blocks[0]} to "
            f"{partition.blocks[-1]}, because heads are not cut: {partition.why_whole}. Policies over samples are as "
            "exact as ever; subnets='blocks' says that you know.",
            stacklevel=2,
        )
    return partition


def default_targets(model: nn.Module, config: D2FTConfig, partition: Partition, blocks: Iterable[int]) -> set[str]:
    """The modules that an adapter targets if ``target_modules`` names none: the projections of some blocks, or of whole
    blocks all that has weights (full fine-tuning), or all linear layers (LoRA).

    Args:
        model: The model.
        config: The adapter's configuration.
        partition: Its subnets.
        blocks: Indices of the blocks.
    """
    if partition.cuts_heads:
        return {name for branch in partition.branches if branch.block in blocks for name in branch.targets}
    names = [partition.blocks[index] for index in sorted(blocks)]
    if config.is_lora:
        paths = _called_linears(model, names)
    else:
        paths = (path for name in names for path in modules_with_weights(model.get_submodule(name), name))
    saved = tuple(f".{name}." for name in config.modules_to_save or () if partition.is_one_subnet)
    targets = {path for path in paths if not any(name in f".{path}." for name in saved)}
    if not targets:
        raise ValueError(
            f"r={config.r!r}: there are no linear layers in {', '.join(names[:2]) or 'the model'} that LoRA could "
            "train; name other layers that PEFT knows (convolutions) in target_modules, or leave r out."
        )
    return targets


def transformed_blocks(config: D2FTConfig, partition: Partition) -> set[int]:
    """Indices of the blocks that ``layers_to_transform`` names; all of them if it is None.

    Raises:
        ValueError: If it names none, or others, or the blocks are in several lists, whose numbers PEFT mixes up.
    """
    layers, blocks = config.layers_to_transform, set(range(len(partition.blocks)))
    if layers is None:
        return blocks
    chosen = {layers} if isinstance(layers, int) else set(layers)
    if not chosen or not chosen <= blocks:
        raise ValueError(f"layers_to_transform={layers!r} must name blocks from 0 to {len(blocks) - 1}.")
    if len({name.rpartition(".")[0] for name in partition.blocks}) > 1:
        raise ValueError(
            f"layers_to_transform={layers!r} is not possible where the blocks are in several lists "
            f"({partition.blocks[0]}, ..., {partition.blocks[-1]}); name modules in target_modules instead."
        )
    return chosen


def linear_layers(model: nn.Module, partition: Partition) -> list[str]:
    """Paths of the linear layers that belong to subnets."""
    if partition.cuts_heads:
        return list(partition.projections)
    return [path for name in partition.blocks for path in _linears(model.get_submodule(name), name)]


def _called_linears(model: nn.Module, blocks: list[str]) -> Iterator[str]:
    """Linear layers of blocks whose weights the model does not read without calling them: LoRA would do nothing."""
    left = set()
    for name in blocks:
        for path in _linears(model.get_submodule(name), name):
            parent, _, leaf = path.rpartition(".")
            if _reads_weight(type(model.get_submodule(parent)), leaf):
                left.add(leaf)
            else:
                yield path
    if left:
        warnings.warn(
            f"LoRA leaves {', '.join(sorted(left))} alone: the model's code reads their weights without calling them.",
            stacklevel=2,
        )


def _linears(module: nn.Module, name: str) -> Iterator[str]:
    if isinstance(module, BaseTunerLayer):
        if _is_linear(unwrap(module)):
            yield name
    elif _is_linear(module):
        yield name
    else:
        for child, part in module.named_children():
            yield from _linears(part, f"{name}.{child}".lstrip("."))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) or is_linear_like(module)


def _reads_weight(kind: type, leaf: str) -> bool:
    """Whether a module's own code computes with the weight of one of its parts, instead of calling it."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # a class without a file
        return False
    reads = rf"(?<!isinstance\()self\.{re.escape(leaf)}\.weight\b(?!\.(?:dtype|device|shape|data\.dtype)|\[)"
    return re.search(reads, source) is not None
