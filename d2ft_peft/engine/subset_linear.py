"""The one primitive of D2FT: linear layers on the features of some heads.

Shape suffixes: M tokens, I input features, O output features, A features of the heads that run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..partition import FeatureLayout
from .dequantize import QuantizedWeight
from .plan import Heads


# Up to this many runs of neighbours are summed run by run, without a copy: no more kernels than a product and a sum.
_FEW_RUNS = 2


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


class SubsetLayer(NamedTuple):
    """One linear layer that runs on some heads.

    Attributes:
        weight: [O, I], or [I, O] if transposed; a quantized one is made dense whenever it is used, in backward again.
        bias: [O] or None. A row-parallel layer adds it whole.
        head_axis: Which features belong to heads.
        addend: Added to the result, which then has its dtype, or None: one pass over memory less than a sum outside.
    """

    weight: Tensor | QuantizedWeight
    bias: Tensor | None
    head_axis: HeadAxis
    addend: Tensor | None = None


@dataclass(frozen=True)
class Selection:
    """The features of some heads along one axis of tensors.

    Features that are neighbours are a view, no copy; others are gathered, or added to, by one kernel.

    Attributes:
        runs: Start and length of each run of neighbours, in the order of the features.
        unit: A width that divides each start, each length and the size of the axis.
    """

    runs: tuple[tuple[int, int], ...]
    unit: int
    _indices: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def take(self, tensor: Tensor, axis: int) -> Tensor:
        """The features along `axis`, counted from the front: a view where they are neighbours, else a copy."""
        if len(self.runs) == 1:
            return tensor.narrow(axis, *self.runs[0])
        units = tensor.unflatten(axis, (-1, self.unit))
        return units.index_select(axis, self._index(tensor.device)).flatten(axis, axis + 1)

    def add(self, values: Tensor, tensor: Tensor, axis: int) -> None:
        """Add `values` to the features in `tensor`."""
        if len(self.runs) == 1:
            tensor.narrow(axis, *self.runs[0]).add_(values)
            return
        units = (axis, (-1, self.unit))
        tensor.unflatten(*units).index_add_(axis, self._index(tensor.device), values.unflatten(*units))

    def add_product(self, left: Tensor, right: Tensor, tensor: Tensor, axis: int) -> None:
        """Add ``left @ right`` to the features in `tensor`, [O, I] or [I, O]."""
        if left.dtype != tensor.dtype or len(self.runs) > _FEW_RUNS:
            self.add(_cast(left @ right, tensor.dtype), tensor, axis)
            return
        factors, offset = [left, right], 0
        for start, length in self.runs:
            factors[axis] = (left, right)[axis].narrow(axis, offset, length)
            of_heads = tensor.narrow(axis, start, length)
            torch.addmm(of_heads, *factors, out=of_heads)  # FlopCounterMode does not know addmm_
            offset += length

    def in_units_of(self, width: int) -> Selection:
        """The same on an axis each of whose features stands for `width`, a divisor of the unit, of this one's."""
        runs = tuple((start // width, length // width) for start, length in self.runs)
        return Selection(runs, self.unit // width)

    def _index(self, device: torch.device) -> Tensor:
        """Numbers of the units, int64, in the order of the features."""
        if device not in self._indices:
            units = [range(start // self.unit, (start + length) // self.unit) for start, length in self.runs]
            with torch.inference_mode(False):  # what evaluation asks for first must serve training, too
                self._indices[device] = torch.tensor(list(itertools.chain(*units)), device=device)
        return self._indices[device]


@lru_cache(maxsize=4096)
def select(layout: FeatureLayout, heads: Heads) -> Selection:
    """Find the runs of neighbours among some heads' features."""
    runs: list[list[int]] = []
    offset = 0
    for width in layout.part_widths:
        for head in heads.indices:
            start = offset + head * width
            if runs and sum(runs[-1]) == start:
                runs[-1][1] += width
            else:
                runs.append([start, width])
        offset += layout.heads * width
    return Selection(tuple((start, length) for start, length in runs), math.gcd(layout.size, *itertools.chain(*runs)))


def subset_linears(x: Tensor, layers: Sequence[SubsetLayer], heads: Heads) -> tuple[Tensor, ...]:
    """Linear layers that share their input (query, key, value) on the features of some heads.

    A column-parallel layer returns the output features of `heads`; a row-parallel layer takes the input features of
    `heads`. Backward keeps a reference to the whole weights and gathers the features again, so that a step never holds
    gathered copies of the model; weights and biases get zero gradients outside of `heads`.

    Args:
        x: Input [..., I] (column) or [..., A] (row).
        layers: The layers.
        heads: The heads that run; at least one.

    Returns:
        For each layer [..., A] (column) or [..., O] (row).

    Raises:
        ValueError: If a weight is a tensor subclass that packs its values, as quantized ones of unknown kinds are.
    """
    for layer in layers:
        if isinstance(layer.weight, QuantizedWeight):
            continue
        if layer.weight.is_meta and not x.is_meta:
            raise ValueError(
                "the weight of a projection is on the meta device (a device_map offloads it to the CPU or to disk), "
                "and its heads cannot be taken; load the model with a device_map that names devices only."
            )
        if hasattr(type(layer.weight), "__tensor_flatten__"):
            raise ValueError(
                f"weight is a {type(layer.weight).__name__}, whose features cannot be taken head by head; D2FT needs "
                "plain tensors: load the model without this quantization or sharding."
            )
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    quantized = [layer.weight for layer in layers if isinstance(layer.weight, QuantizedWeight)]
    if not quantized:
        return _linears(_cast(x, dtype), layers, heads)
    dtypes = {weight.compute_dtype or dtype for weight in quantized}
    if len(layers) > 1 and (len(dtypes) > 1 or len(quantized) < len(layers)):
        return tuple(itertools.chain(*(subset_linears(x, [layer], heads) for layer in layers)))
    outputs = _linears(_cast(x, dtypes.pop()), layers, heads)
    returned = (dtype if weight.compute_dtype is None else x.dtype for weight in quantized)
    return tuple(map(_cast, outputs, returned))


def _linears(x: Tensor, layers: Sequence[SubsetLayer], heads: Heads) -> tuple[Tensor, ...]:
    """`subset_linears` in the dtype of x."""
    selections = [select(layer.head_axis.layout, heads) for layer in layers]
    if not torch.is_grad_enabled():
        return tuple(_output(x, *layer, selection) for layer, selection in zip(layers, selections, strict=True))
    weights, biases, axes, addends = zip(*layers, strict=True)
    # In two dimensions: a view that was made within the function could not be changed in place, as some models do.
    flat = [None if addend is None else addend.reshape(-1, addend.shape[-1]) for addend in addends]
    outputs = _SubsetLinears.apply(x.reshape(-1, x.shape[-1]), axes, selections, *weights, *biases, *flat)
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outputs)


def _output(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    bias: Tensor | None,
    head_axis: HeadAxis,
    addend: Tensor | None,
    selection: Selection,
) -> Tensor:
    if bias is not None:
        bias = _cast(selection.take(bias, 0) if head_axis.kind == "column" else bias, x.dtype)
    selected = _selected(weight, head_axis, selection, x.dtype)
    if addend is not None and bias is None and addend.dtype == x.dtype:
        out_MO = torch.addmm(addend.reshape(-1, len(selected)), x.reshape(-1, x.shape[-1]), selected.t())
        return _no_view(out_MO.view(addend.shape))
    out = _no_view(F.linear(x, selected, bias))
    return out if addend is None else _cast(out, addend.dtype).add_(addend)


def _no_view(out: Tensor) -> Tensor:
    """The tensor, of which autograd does not know that it is a view: models change such outputs in place (Falcon adds
    attention to its FFN, OLMoE clamps its projections), which it refuses for views that it did not see being made."""
    return out.data if out._is_view() else out


class _SubsetLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axes, selections, *tensors):
        n = len(axes)
        weights, biases, addends = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        outputs = tuple(map(_output, [x] * n, weights, biases, axes, addends, selections))
        needs = ctx.needs_input_grad
        dense = [weight if isinstance(weight, Tensor) else None for weight in weights]
        ctx.save_for_backward(x if any(needs[3 : 3 + n]) else None, *(dense if needs[0] else ()))
        ctx.quantized = [weight if isinstance(weight, QuantizedWeight) else None for weight in weights]
        ctx.axes, ctx.selections, ctx.dtype, ctx.shape = axes, selections, x.dtype, x.shape
        ctx.weight_facts = [None if weight is None else (weight.shape, weight.dtype) for weight in dense]
        # Edges of the graph are numbered by the tensors among the inputs, of which x is the first.
        ctx.edges = list(itertools.accumulate(isinstance(tensor, Tensor) for tensor in tensors))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True asks for second derivatives, which a D2FT plan does not have: take them outside of "
                "a micro-batch, where every head is FULL."
            )
        n, needs = len(grads), ctx.needs_input_grad
        x, *weights = ctx.saved_tensors
        x_MI = None if x is None else x.reshape(-1, x.shape[-1])
        grad_x, of_tensors = None, [None] * (3 * n)
        for j, grad in enumerate(grads):
            if grad is None:
                continue
            if needs[3 + 2 * n + j]:
                of_tensors[2 * n + j] = grad
            grad = _cast(grad, ctx.dtype)
            grad_MO = grad.reshape(-1, grad.shape[-1])
            if needs[0]:
                weight = _selected(ctx.quantized[j] or weights[j], ctx.axes[j], ctx.selections[j], ctx.dtype)
                if grad_x is None:
                    grad_x = grad_MO @ weight
                else:
                    torch.addmm(grad_x, grad_MO, weight, out=grad_x)
            if needs[3 + j]:
                of_tensors[j] = _weight_gradient(ctx, j, grad_MO, x_MI)
            if needs[3 + n + j]:
                of_tensors[n + j] = _bias_gradient(ctx, j, grad_MO)
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, *of_tensors


def _weight_gradient(ctx, j: int, grad_MO: Tensor, x_MI: Tensor) -> Tensor | None:
    """Gradient of the weight of layer j, or None if it was added in place."""
    head_axis, selection, (shape, dtype) = ctx.axes[j], ctx.selections[j], ctx.weight_facts[j]
    # The product comes in the layout of the weight, so that its features are put back without transposing.
    left, right = (x_MI.t(), grad_MO) if head_axis.transposed else (grad_MO.t(), x_MI)
    accumulated = _accumulated(ctx.next_functions[ctx.edges[j]][0])
    gradient = left.new_zeros(shape, dtype=dtype) if accumulated is None else accumulated
    selection.add_product(left, right, gradient, head_axis.axis)
    return gradient if accumulated is None else None


def _bias_gradient(ctx, j: int, grad_MO: Tensor) -> Tensor | None:
    """Gradient of the bias of layer j, or None if it was added in place."""
    head_axis, selection, facts = ctx.axes[j], ctx.selections[j], ctx.weight_facts[j]
    grad = grad_MO.sum(0) if facts is None else _cast(grad_MO.sum(0), facts[1])
    if head_axis.kind == "row":
        return grad
    accumulated = _accumulated(ctx.next_functions[ctx.edges[len(ctx.axes) + j]][0])
    gradient = grad.new_zeros(head_axis.layout.size) if accumulated is None else accumulated
    selection.add(grad, gradient, 0)
    return gradient if accumulated is None else None


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


def _selected(
    weight: Tensor | QuantizedWeight, head_axis: HeadAxis, selection: Selection, dtype: torch.dtype
) -> Tensor:
    """The weight of the selected heads as [O, I], with the sizes of their features."""
    if isinstance(weight, QuantizedWeight):
        return weight.take(selection, head_axis.axis, dtype)
    selected = _cast(selection.take(weight, head_axis.axis), dtype)
    return selected.t() if head_axis.transposed else selected


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without the call where nothing is to be done: it is made six times per projection."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
