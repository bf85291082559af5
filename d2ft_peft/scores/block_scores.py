"""Contribution scores of whole blocks: sums over all their weights, by one backward pass for each sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ..batches import batch_size, some_samples
from ..partition import Partition, base_model
from ..tuners import D2FTLayer
from ..tuners.adapter_checks import is_dense


@torch.no_grad()
def magnitude_of_blocks(model: nn.Module, partition: Partition) -> np.ndarray:
    """Sum of the absolute weights of every block without its LoRA factors, those of quantized layers as they compute,
    float [K]."""
    base = base_model(model)
    return np.array([_magnitude(base.get_submodule(name), name) for name in partition.blocks])


def _magnitude(module: nn.Module, name: str) -> float:
    if isinstance(module, D2FTLayer):
        return _magnitude(module.active_layer(), name)
    if isinstance(module, LoraLayer):
        return _magnitude(module.get_base_layer(), name)
    if hasattr(module, "in_features") and not is_dense(getattr(module, "weight", None)):
        bias = getattr(module, "bias", None)
        return _absolute_sum(dequantized(module, name)) + (0.0 if bias is None else _absolute_sum(bias))
    own = sum(_absolute_sum(parameter) for parameter in module.parameters(recurse=False))
    return own + sum(_magnitude(child, f"{name}.{part}") for part, child in module.named_children())


def dequantized(module: nn.Module, name: str) -> Tensor:
    """The weight that a quantized layer stands for.

    Raises:
        ValueError: If the layer, named so, is of a kind that cannot be read.
    """
    if not hasattr(module, "W_q") and not isinstance(getattr(module, "weight", None), Tensor):
        raise ValueError(
            f"{name} is a {type(module).__name__}, whose weights D2FT cannot read; choose a score that follows "
            "training, such as backward_score='loss'."
        )
    weight = getattr(module, "weight", None)
    try:
        return dequantize_module_weight(module)
    finally:
        # On CPUs PEFT puts a copy of bitsandbytes' int8 parameter into the layer; after a first forward pass it has no
        # scales, and the layer would take none for its own.
        if weight is not None and module.weight is not weight:
            module.weight = weight


def _absolute_sum(values: Tensor) -> float:
    return float(values.abs().sum(dtype=torch.float64))


def gradient_scores_of_blocks(
    model: nn.Module,
    partition: Partition,
    batch: Mapping[str, Tensor],
    measure: Callable[[Tensor, Tensor], Tensor],
    per_sample: bool,
) -> np.ndarray:
    """Sums over the trained weights of every block of what `measure` makes of their gradients.

    Args:
        model: The model, as at inference and with gradients enabled.
        partition: Its subnets.
        batch: Inputs with labels, samples on the first axis.
        measure: Of a gradient and its parameter.
        per_sample: Whether each sample is scored by the gradient of its own loss, or the batch as a whole.

    Returns:
        float [samples, K], or [1, K] for the batch as a whole.

    Raises:
        ValueError: If no weight of a block trains, or the model returns no loss.
    """
    base = base_model(model)
    blocks = [[p for p in base.get_submodule(name).parameters() if p.requires_grad] for name in partition.blocks]
    parameters = [parameter for block in blocks for parameter in block]
    if not parameters:
        raise ValueError("nothing in the blocks trains, so gradients score nothing; unfreeze the model.")
    parts = [slice(i, i + 1) for i in range(batch_size(batch))] if per_sample else [slice(None)]
    scores = np.zeros((len(parts), partition.num_scheduled))
    for row, which in enumerate(parts):
        loss = getattr(model(**some_samples(batch, which)), "loss", None)
        if loss is None:
            raise ValueError("the model returned no loss, so gradients score nothing; give labels in the batch.")
        gradients = iter(torch.autograd.grad(loss, parameters, allow_unused=True))
        for index, block in enumerate(blocks):
            pairs = [(next(gradients), parameter) for parameter in block]
            scores[row, index] = sum(
                float(measure(wide(gradient), parameter).sum(dtype=torch.float64))
                for gradient, parameter in pairs
                if gradient is not None
            )
    return scores


def wide(values: Tensor) -> Tensor:
    """Half-precision values in float32: their squares and sums leave the range, or the resolution, of their type."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
