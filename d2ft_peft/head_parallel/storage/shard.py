"""Cuts a model to the heads that one rank owns, and puts whole tensors together again for saving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ...engine.plan import Heads
from ...engine.subset_linear import select
from ...partition import Branch, FeatureLayout, Partition, Projection
from ...tuners import D2FTLayer
from ..placement import heads_by_rank


@dataclass(frozen=True)
class Shard:
    """A parameter of which each rank keeps the features of its heads.

    Attributes:
        module: The layer that has it.
        parameter: Its name there, ``"weight"`` or ``"bias"``.
        axis: The axis that belongs to heads.
        layout: How the whole axis belongs to heads.
        heads: Heads of each rank, in the order of their features.
        of_adapter: Whether it belongs to an adapter, not to the frozen base model.
    """

    module: nn.Module
    parameter: str
    axis: int
    layout: FeatureLayout
    heads: tuple[tuple[int, ...], ...]
    of_adapter: bool

    @property
    def tensor(self) -> nn.Parameter:
        """This rank's part."""
        return getattr(self.module, self.parameter)

    def shape(self, num_heads: int) -> torch.Size:
        """Shape of a part of `num_heads` heads."""
        shape = list(self.tensor.shape)
        shape[self.axis] = num_heads * self.layout.head_size
        return torch.Size(shape)

    def is_whole(self, shape: Sequence[int]) -> bool:
        """Whether a shape is that of the whole parameter."""
        return tuple(shape) == tuple(self.shape(self.layout.heads))

    def take(self, num_heads: int, heads: tuple[int, ...]) -> Tensor:
        """The features of some heads, by their positions among the `num_heads` that are here; differentiable."""
        return select(replace(self.layout, heads=num_heads), Heads(heads)).take(self.tensor, self.axis)

    def part(self, whole: Any, rank: int) -> Tensor:
        """A rank's part of a whole tensor, copied.

        Args:
            whole: A tensor of the parameter's shape, or a slice of a safetensors file (``get_slice``), of which only
                the part is then read.
            rank: The rank.
        """
        before = (slice(None),) * self.axis
        runs = select(self.layout, Heads(self.heads[rank])).runs
        return torch.cat([whole[(*before, slice(start, start + length))] for start, length in runs], self.axis)

    def join(self, parts: list[Tensor]) -> Tensor:
        """The whole tensor from every rank's part."""
        whole = parts[0].new_empty(self.shape(self.layout.heads))
        for part, heads in zip(parts, self.heads, strict=True):
            offset = 0
            for start, length in select(self.layout, Heads(heads)).runs:
                whole.narrow(self.axis, start, length).copy_(part.narrow(self.axis, offset, length))
                offset += length
        return whole


@torch.no_grad()
def cut_model(shards: Sequence[Shard], rank: int) -> None:
    """Keep the features of this rank's heads in every projection; the rest is freed.

    Parameters stay the same objects, so that names and optimizers that know them stay valid. What was loaded as a part
    stays as it is.

    Args:
        shards: The model's parameters that belong to heads.
        rank: This rank.
    """
    for shard in shards:
        if shard.is_whole(shard.tensor.shape):
            shard.tensor.data = shard.part(shard.tensor.data, rank)
        _set_features(shard)


def shards_of(base: nn.Module, partition: Partition, ranks: np.ndarray) -> list[Shard]:
    """The parameters that belong to heads, whole or cut, in the same order on every rank.

    Args:
        base: The transformers model whose paths the partition names.
        partition: Its subnets.
        ranks: Rank of each subnet, [K].
    """
    shards = []
    for branch in partition.branches:
        heads = heads_by_rank(partition, ranks, branch.block)
        for projection in branch.projections:
            shards += _shards(base.get_submodule(projection.name), projection, branch, heads)
    return shards


def _shards(
    module: nn.Module, projection: Projection, branch: Branch, heads: tuple[tuple[int, ...], ...]
) -> Iterator[Shard]:
    """The parameters of one projection that belong to heads. A row-parallel bias belongs to none."""
    layout, column = projection.layout, projection.kind == "column"
    if isinstance(module, D2FTLayer):
        layers = [(module.base_layer, False), *((layer, True) for layer in module.d2ft_layers.values())]
    else:
        layers = [(module.base_layer if isinstance(module, LoraLayer) else module, False)]
    for layer, of_adapter in layers:
        yield Shard(layer, "weight", projection.head_axis, layout, heads, of_adapter)
        if column and layer.bias is not None:
            yield Shard(layer, "bias", 0, layout, heads, of_adapter)
    if isinstance(module, LoraLayer):
        # The other factor is shared by all heads.
        factors = module.lora_B if column else module.lora_A
        for factor in factors.values():
            yield Shard(factor, "weight", 0 if column else 1, layout, heads, True)


def _set_features(shard: Shard) -> None:
    """Tell a layer its new size; transformers' ``Conv1D`` is told at every run, see `BranchForward`."""
    module = shard.module
    if shard.parameter == "weight" and isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape


def row_biases(base: nn.Module, branch: Branch) -> list[nn.Parameter]:
    """Biases of a branch's row-parallel projection, of the base model and of every adapter."""
    module = base.get_submodule(branch.row.name)
    layers = [m for m in module.modules() if not isinstance(m, D2FTLayer | LoraLayer)]
    return [bias for layer in layers if (bias := getattr(layer, "bias", None)) is not None]
