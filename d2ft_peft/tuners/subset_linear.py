"""The one primitive of D2FT: a linear layer on the features of some heads.

Shape suffixes: M tokens, I input features, O output features, A features of the heads that run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
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


@dataclass(frozen=True)
class Selection:
    """The features of some heads along one axis of tensors, prepared: execution is a few calls into PyTorch.

    A tensor is viewed as [outer, heads, inner], in which each head is one slice of the middle axis.

    Attributes:
        layout: How the features of the axis belong to heads.
        heads: The heads.
        start: First feature, if the heads are consecutive and a view holds their features; else None.
        length: Number of their features.
    """

    layout: FeatureLayout
    heads: Heads
    start: int | None
    length: int

    def take(self, tensor: Tensor, axis: int) -> Tensor:
        """The features of the heads along `axis`, 0 or 1: a view where the heads are consecutive, else a copy."""
        if self.start is not None:
            return tensor.narrow(axis, self.start, self.length)
        outer, inner, shape = self._view(tensor.shape, axis)
        by_head = tensor.view(outer, self.layout.heads, inner)
        return by_head.index_select(1, self.heads.index(tensor.device)).view(shape)

    def put(self, values: Tensor, shape: torch.Size, axis: int) -> Tensor:
        """Inverse of `take`: a tensor of this shape with `values` for the heads, and zeros elsewhere."""
        tensor = values.new_zeros(shape)
        self.add(values, tensor, axis)
        return tensor

    def add(self, values: Tensor, tensor: Tensor, axis: int) -> None:
        """Add `values` to the features of the heads in `tensor`."""
        if self.start is not None:
            tensor.narrow(axis, self.start, self.length).add_(values)
            return
        outer, inner, _ = self._view(tensor.shape, axis)
        by_head = tensor.view(outer, self.layout.heads, inner)
        by_head.index_add_(1, self.heads.index(tensor.device), values.view(outer, len(self.heads), inner))

    def add_product(self, left: Tensor, right: Tensor, tensor: Tensor, axis: int) -> None:
        """Add ``left @ right`` to the features of the heads in `tensor`, [O, I] or [I, O]."""
        if self.start is not None and left.dtype == tensor.dtype:
            of_heads = tensor.narrow(axis, self.start, self.length)
            torch.addmm(of_heads, left, right, out=of_heads)  # FlopCounterMode does not know addmm_
        else:
            self.add(_cast(left @ right, tensor.dtype), tensor, axis)

    def _view(self, shape: torch.Size, axis: int) -> tuple[int, int, list[int]]:
        """(outer, inner, shape of what is selected) of a tensor."""
        layout, selected = self.layout, list(shape)
        selected[axis] = self.length
        if axis == 0:
            return layout.parts, layout.width * (shape[1] if len(shape) > 1 else 1), selected
        return shape[0] * layout.parts, layout.width, selected


@lru_cache(maxsize=4096)
def select(layout: FeatureLayout, heads: Heads) -> Selection:
    """Prepare the selection of some heads' features."""
    first = heads.indices[0] if heads.indices else 0
    consecutive = layout.parts == 1 and heads.indices == tuple(range(first, first + len(heads)))
    length = layout.parts * layout.width * len(heads)
    return Selection(layout, heads, first * layout.width if consecutive else None, length)


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
        selection = select(head_axis.layout, heads)
        if bias is not None:
            bias = selection.take(bias, 0) if head_axis.kind == "column" else bias
            bias = _cast(bias, x.dtype)
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None)
        ctx.head_axis, ctx.selection = head_axis, selection
        ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
        out = F.linear(x, _selected(weight, head_axis, selection, x.dtype), bias)
        ctx.dtype = out.dtype
        return out if addend is None else _cast(out, addend.dtype).add_(addend)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        head_axis, selection, needs = ctx.head_axis, ctx.selection, ctx.needs_input_grad
        grad_addend = grad if needs[5] else None
        grad = _cast(grad, ctx.dtype)
        grad_MO = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if needs[0]:
            grad_x = (grad_MO @ _selected(weight, head_axis, selection, grad.dtype)).view(*grad.shape[:-1], -1)
        if needs[1]:
            x_MI = x.reshape(-1, x.shape[-1])
            # The product comes in the layout of the weight, so that its features are put back without transposing.
            left, right = (x_MI.t(), grad_MO) if head_axis.transposed else (grad_MO.t(), x_MI)
            accumulated = _accumulated(ctx.next_functions[1][0])
            if accumulated is None:
                values = _cast(left @ right, ctx.weight_dtype)
                grad_weight = selection.put(values, ctx.weight_shape, head_axis.axis)
            else:
                selection.add_product(left, right, accumulated, head_axis.axis)
        if needs[2]:
            grad_bias = _cast(grad_MO.sum(0), ctx.weight_dtype)
            if head_axis.kind == "column":
                accumulated = _accumulated(ctx.next_functions[2][0])
                if accumulated is None:
                    grad_bias = selection.put(grad_bias, torch.Size([head_axis.layout.size]), 0)
                else:
                    selection.add(grad_bias, accumulated, 0)
                    grad_bias = None
        return grad_x, grad_weight, grad_bias, None, None, grad_addend


def _accumulated(node: torch.autograd.graph.Node | None) -> Tensor | None:
    """The gradient of earlier micro-batches, if adding to it here equals what autograd does with a returned gradient.

    Autograd would add a tensor as large as the weight, most of it zeros; the sum in place touches only what trained.
    Not where somebody looks at the gradient on its way: a hook, or `torch.autograd.grad`. DistributedDataParallel looks
    later, when the gradient is complete.
    """
    weight = getattr(node, "variable", None)
    if weight is None or weight.grad is None or weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return None
    try:
        executed = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # under torch.autograd.grad the gradient of a leaf is captured, not accumulated
        return None
    return weight.grad if executed and weight.grad.is_contiguous() else None


def _selected(weight: Tensor, head_axis: HeadAxis, selection: Selection, dtype: torch.dtype) -> Tensor:
    """The weight of the selected heads as [O, I], with the sizes of their features."""
    selected = _cast(selection.take(weight, head_axis.axis), dtype)
    return selected.t() if head_axis.transposed else selected


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without the call where nothing is to be done: it is made six times per projection."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
