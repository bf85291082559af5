"""How much a forward pass keeps for its backward pass, counted on a model without weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _Fused(torch.autograd.Function):
    """What a fused kernel keeps: queries, keys, values, mask, its output and a number for each query."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)  # as kernels lay it out
        ctx.save_for_backward(query, key, value, mask, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


class _FusedAttention(TorchFunctionMode):
    """On the meta device attention falls apart into products, whose probabilities would be kept; every real device has
    a fused kernel."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention or not args[0].is_meta:
            return func(*args, **kwargs)
        return _Fused.apply(*args[:3], kwargs.get("attn_mask"))


def kept_bytes(model: nn.Module, batch: dict[str, Any]) -> int:
    """Bytes that one training forward pass keeps, each storage counted once, without weights and buffers.

    Args:
        model: A model on the meta device.
        batch: A batch on the meta device.
    """
    own = {id_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}  # holds on to the storages: an address is not given out twice

    def note(tensor: Tensor) -> Tensor:
        if id_of(tensor) not in own:
            kept[id_of(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), _FusedAttention():
        model(**batch)
    return sum(storage.nbytes() for storage in kept.values())


def id_of(tensor: Tensor) -> int:
    """What tells storages apart, also on the meta device, where they have no address."""
    return tensor.untyped_storage()._cdata
