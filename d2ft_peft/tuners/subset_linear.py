"""The one primitive of D2FT: a linear layer on the features of some heads.

Shape suffixes: M tokens, I input features, O output features, A features of the heads that run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..partition import FeatureLayout
from .plan import Heads


@dataclass(frozen=True)
class HeadAxis:
    """The axis of a weight that belongs to heads.

    Attributes:
        kind: ``"column"``: the output features belong to heads; ``"row"``: the input features do.
        layout: How the features belong to heads.
        transposed: True if the weight is [I, O] (transformers ``Conv1D``) instead of [O, I].
    """

    kind: Literal["column", "row"]
    layout: FeatureLayout
    transposed: bool = False

    @property
    def axis(self) -> int:
        """Its position in the weight."""
        return int((self.kind == "row") != self.transposed)


def select_features(tensor: Tensor, axis: int, layout: FeatureLayout, heads: Heads) -> Tensor:
    """The features of `heads` along one axis: a view where the heads are consecutive, else a copy."""
    if layout.parts == 1 and heads.start is not None:
        return tensor.narrow(axis, heads.start * layout.width, len(heads) * layout.width)
    by_head = tensor.unflatten(axis, (layout.parts, layout.heads, layout.width))
    return by_head.index_select(axis + 1, heads.index(tensor.device)).flatten(axis, axis + 2)


def scatter_features(selected: Tensor, size: torch.Size, axis: int, layout: FeatureLayout, heads: Heads) -> Tensor:
    """Inverse of `select_features`: a tensor of shape `size` with the features of `heads`, and zeros elsewhere."""
    tensor = selected.new_zeros(size)
    if layout.parts == 1 and heads.start is not None:
        tensor.narrow(axis, heads.start * layout.width, len(heads) * layout.width).copy_(selected)
    else:
        by_head = tensor.unflatten(axis, (layout.parts, layout.heads, layout.width))
        values = selected.unflatten(axis, (layout.parts, len(heads), layout.width))
        by_head.index_copy_(axis + 1, heads.index(tensor.device), values)
    return tensor


def subset_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head_axis: HeadAxis,
    heads: Heads,
    addend: Tensor | None = None,
) -> Tensor:
    """A linear layer on the features of some heads.

    A column-parallel layer returns the output features of `heads`; a row-parallel layer takes the input features of
    `heads`. Backward keeps a reference to the whole weight and gathers the features again, so that a step never holds
    gathered copies of the model; weight and bias get zero gradients outside of `heads`.

    Args:
        x: Input [..., I] (column) or [..., A] (row).
        weight: [O, I], or [I, O] if transposed.
        bias: [O] or None. A row-parallel layer adds it whole.
        head_axis: Which features belong to heads.
        heads: The heads that run.
        addend: Added to the result, which then has its dtype: one pass over memory less than a sum outside.

    Returns:
        [..., A] (column) or [..., O] (row).
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _SubsetLinear.apply(x, weight, bias, head_axis, heads, addend)


class _SubsetLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, head_axis, heads, addend):
        if bias is not None and head_axis.kind == "column":
            bias = select_features(bias, 0, head_axis.layout, heads)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.head_axis, ctx.heads = head_axis, heads
        ctx.bias_dtype = None if bias is None else bias.dtype
        out = F.linear(x, _selected(weight, head_axis, heads, x.dtype), None if bias is None else bias.to(x.dtype))
        ctx.dtype = out.dtype
        return out if addend is None else out.to(addend.dtype).add_(addend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        head_axis, heads, layout = ctx.head_axis, ctx.heads, ctx.head_axis.layout
        grad_addend = grad if ctx.needs_input_grad[5] else None
        grad = grad.to(ctx.dtype)
        grad_MO = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_MO @ _selected(weight, head_axis, heads, grad.dtype)).reshape(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            x_MI = x.reshape(-1, x.shape[-1])
            # The product comes in the layout of the weight, so that its features are scattered without transposing.
            values = x_MI.t() @ grad_MO if head_axis.transposed else grad_MO.t() @ x_MI
            grad_weight = scatter_features(values.to(weight.dtype), weight.shape, head_axis.axis, layout, heads)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_MO.sum(0).to(ctx.bias_dtype)
            if head_axis.kind == "column":
                grad_bias = scatter_features(grad_bias, torch.Size([layout.size]), 0, layout, heads)
        return grad_x, grad_weight, grad_bias, None, None, grad_addend


def _selected(weight: Tensor, head_axis: HeadAxis, heads: Heads, dtype: torch.dtype) -> Tensor:
    """The weight of `heads` as [O, I], with the sizes of the active features."""
    selected = select_features(weight, head_axis.axis, head_axis.layout, heads).to(dtype)
    return selected.t() if head_axis.transposed else selected
