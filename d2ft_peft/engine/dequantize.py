"""Quantized weights as the dense ones that they stand for, by kind; other kinds are unknown here, and never sliced."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn


if TYPE_CHECKING:
    from .subset_linear import Selection


class QuantizedWeight(NamedTuple):
    """The weight of a quantized linear layer, of which what is used becomes dense while it is used.

    Attributes:
        layer: The layer.
        read: Makes dense what a selection takes of such a layer's weight [O, I] along an axis.
        compute_dtype: What the layer casts its input to, and its output back from; None if it computes in its input's.
    """

    layer: nn.Module
    read: Callable[[Any, Selection, int], Tensor]
    compute_dtype: torch.dtype | None = None

    def take(self, selection: Selection, axis: int, dtype: torch.dtype) -> Tensor:
        """The selected rows (axis 0) or columns (axis 1), made anew."""
        return self.read(self.layer, selection, axis).to(dtype)


def quantized_weight(layer: nn.Module) -> QuantizedWeight | None:
    """The weight of a layer whose kind is known; None of dense layers, and of quantized ones that are not.

    Layers are known by their own class and package, without an import; one that is derived from them may compute
    otherwise.
    """
    kind = type(layer)
    weight = getattr(layer, "weight", None)
    if kind is nn.Linear:
        if type(weight) is nn.Parameter:
            return None
        return QuantizedWeight(layer, _torchao_int8) if _is_int8_weight_only(weight) else None
    package = kind.__module__.partition(".")[0]
    if _is_four_bit(layer):
        state = _four_bit_state(layer)
        known = state is not None and tuple(state.shape) == (layer.out_features, layer.in_features)
        return QuantizedWeight(layer, _four_bit, layer.compute_dtype) if known else None
    if package == "bitsandbytes" and kind.__name__ == "Linear8bitLt":
        known = weight.dtype == torch.int8 and _int8_scales(layer) is not None
        return QuantizedWeight(layer, _int8) if known else None
    if package == "hqq" and kind.__name__ == "HQQLinear":
        return QuantizedWeight(layer, _hqq) if layer.ready else None
    return None


def keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4 bit weights for inference, which it does at a forward pass in eval mode on CPUs
    with AVX512-BF16, for good: later passes in train mode return no gradient, and nothing says so.

    Args:
        model: The model; its evaluations compute as training does from now on.

    Raises:
        ValueError: If that has happened to one of its weights.
    """
    for name, layer in model.named_modules():
        if not _is_four_bit(layer):
            continue
        if getattr(_four_bit_state(layer), "packing_format_for_cpu", False):
            raise ValueError(
                f"bitsandbytes has packed the 4 bit weight of {name} for inference, in a forward pass in eval mode, "
                "and no gradient passes it any more; load the model anew, and give it its adapter (with "
                "is_trainable=True if that is loaded) before its first evaluation."
            )
        layer.support_avx512bf16_for_cpu = False


def _is_four_bit(layer: nn.Module) -> bool:
    kind = type(layer)
    named = kind.__name__ in ("Linear4bit", "LinearNF4", "LinearFP4")
    return named and kind.__module__.partition(".")[0] == "bitsandbytes"


def _is_int8_weight_only(weight: Any) -> bool:
    """Whether a weight is torchao's, by rows or whole, and the activations are left as they are."""
    if type(weight).__name__ != "Int8Tensor" or type(weight).__module__.partition(".")[0] != "torchao":
        return False
    return weight.act_quant_kwargs is None and weight.act_pre_scale is None


def _torchao_int8(layer: nn.Linear, selection: Selection, axis: int) -> Tensor:
    return selection.take(layer.weight.dequantize(), axis)


def _hqq(layer: Any, selection: Selection, axis: int) -> Tensor:
    return selection.take(layer.dequantize(), axis)


def _int8(layer: Any, selection: Selection, axis: int) -> Tensor:
    scales = (_int8_scales(layer) / 127.0)[:, None]
    return selection.take(layer.weight.data, axis) * (selection.take(scales, 0) if axis == 0 else scales)


def _int8_scales(layer: Any) -> Tensor | None:
    """Largest absolute value of each row; the first call of the layer moves them from its weight into its state."""
    return layer.weight.SCB if layer.state.SCB is None else layer.state.SCB


def _four_bit(layer: Any, selection: Selection, axis: int) -> Tensor:
    """Whole blocks of weights that share a scale, [O, I / block], of which only those of the selection are read."""
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

    state = _four_bit_state(layer)
    size, packed = state.blocksize, layer.weight.data.view(-1, 1)
    rows, columns = state.shape
    if columns % size or (axis == 1 and selection.unit % size):
        return selection.take(dequantize_4bit(packed, state), axis)
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    if axis == 1:
        selection = selection.in_units_of(size)
    # The kernels read from a pointer on, whatever the strides.
    packed = selection.take(packed.view(torch.uint8).view(rows, columns // size, size // 2), axis).contiguous()
    scales = selection.take(scales.float().view(rows, columns // size), axis).contiguous()
    shape = torch.Size((packed.shape[0], packed.shape[1] * size))
    part = QuantState(scales.view(-1), shape, state.code, size, state.quant_type, state.dtype)
    return dequantize_4bit(packed.view(-1, 1), part)


def _four_bit_state(layer: Any) -> Any:
    """The scales of a 4 bit weight; where the parameter was made anew (FSDP) the layer still has them."""
    state = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if state is None else state
