"""Contribution scores of subnets (arXiv 2504.12471, section 3): how much a subnet matters for a sample.

| score | of subnet k for a sample with loss L | source |
|---|---|---|
| ``weight_magnitude`` | sum of abs(w_k), the same for every sample | the paper's backward score |
| ``fisher`` | sum of (dL/dw_k)^2, the empirical Fisher information | the paper's forward score |
| ``gradient_magnitude`` | sum of abs(dL/dw_k) | |
| ``taylor`` | sum of abs(w_k dL/dw_k), the change of L if w_k went to zero, to first order | |

w_k are the weights that subnet k owns and trains: rows of column-parallel and columns of row-parallel projections;
under LoRA rows of B and columns of A (the other factor is shared by all heads). The magnitude of weights is always
that of the projections themselves, since LoRA's B starts at zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ..costs import inference
from ..engine.subset_linear import HeadAxis
from ..partition import Partition, Projection, base_model, parts_elsewhere, unwrap
from ..tuners import D2FTLayer
from ..tuners.adapter_checks import is_dense
from .block_scores import dequantized, gradient_scores_of_blocks, magnitude_of_blocks, wide


# Elements of per-sample weight gradients that are held at a time (256 MiB in float32).
_GRADIENT_ELEMENTS = 1 << 26
GRADIENT_SCORES = ("fisher", "gradient_magnitude", "taylor")


@torch.no_grad()
def weight_magnitude(model: nn.Module, partition: Partition) -> np.ndarray:
    """Sum of the absolute weights of every subnet, float [K]; those of half precision are added up in float32.

    Where blocks run elsewhere nothing is known of their weights: with a warning, the number of weights of every subnet.
    """
    if elsewhere := parts_elsewhere(model):
        warnings.warn(
            f"weights of {len(elsewhere)} blocks are elsewhere, so that a subnet's size stands in for the magnitude of "
            "its weights; choose a score that follows training, such as backward_score='loss'.",
            stacklevel=2,
        )
        sizes = {b: sum(p.in_features * p.out_features / b.heads for p in b.projections) for b in partition.branches}
        blocks = [
            sum(size for b, size in sizes.items() if b.block == s.block) * len(s.heads) for s in partition.subnets
        ]
        return np.array(blocks)
    if not partition.cuts_heads:
        return magnitude_of_blocks(model, partition)
    base = base_model(model)
    heads = _HeadSums(partition)
    for index, branch in enumerate(partition.branches):
        for projection in branch.projections:
            module = base.get_submodule(projection.name)
            layer = module.active_layer() if isinstance(module, D2FTLayer) else unwrap(module)
            axis = HeadAxis(projection.kind, projection.layout, projection.transposed)
            dense = is_dense(getattr(layer, "weight", None))
            weight = _whole(layer.weight) if dense else dequantized(layer, projection.name)
            heads.add(index, _by_head(weight.abs()[None], axis))
            if projection.kind == "column" and layer.bias is not None:
                heads.add(index, _by_head(_whole(layer.bias).abs()[None], HeadAxis("column", projection.layout)))
    return heads.by_subnet()[0]


def gradient_scores(
    model: nn.Module, partition: Partition, batch: dict[str, Tensor], score: str, per_sample: bool = True
) -> np.ndarray:
    """Score subnets by the gradients of one batch's loss, with the model as it is at inference.

    Weights, their ``.grad``, training flags and random state stay as they are.

    Args:
        model: A D2FT model, or a plain one whose projections train.
        partition: Its subnets.
        batch: Inputs with labels, samples on the first axis.
        score: ``"fisher"``, ``"gradient_magnitude"`` or ``"taylor"``.
        per_sample: Score every sample by the gradient of its own loss (the batch's loss is taken as the mean over its
            samples), or the batch as a whole.

    Returns:
        float [samples, K], or [1, K] for the batch as a whole.

    Raises:
        ValueError: If the score is unknown, the model returns no loss, or no projection trains.
    """
    if score not in GRADIENT_SCORES:
        raise ValueError(f"score={score!r} is not a gradient score; choose one of {', '.join(GRADIENT_SCORES)}.")
    if not partition.cuts_heads:
        with inference(model), torch.enable_grad():
            return gradient_scores_of_blocks(model, partition, batch, partial(_measure, score=score), per_sample)
    base = base_model(model)
    carriers = [
        (index, *c) for index, b in enumerate(partition.branches) for p in b.projections for c in _carriers(base, p)
    ]
    if not carriers:
        raise ValueError("no projection of the subnets trains, so gradients score nothing; unfreeze the model.")
    with inference(model), torch.enable_grad(), _record([module for _, module, _ in carriers]) as records:
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise ValueError("the model returned no loss, so gradients score nothing; give labels in the batch.")
        seen = [record for record in records if record is not None]
        output_gradients = iter(torch.autograd.grad(loss, [output for _, output in seen]))
    heads = _HeadSums(partition)
    samples = next((len(x) for x, _ in seen if x.ndim > 2), 1)
    for (index, module, axis), record in zip(carriers, records, strict=True):
        if record is not None:
            x, gradient = (_by_sample(values, samples) for values in (record[0], next(output_gradients)))
            if not per_sample:
                x, gradient = x.flatten(0, 1)[None], gradient.flatten(0, 1)[None]
            # The loss is a mean: a sample's own gradient is as many times larger as there are samples.
            heads.add_gradients(index, module, axis, x, wide(gradient) * len(gradient), score)
    return heads.by_subnet()


class _HeadSums:
    """Sums per (sample, branch, head), and what they make per subnet."""

    def __init__(self, partition: Partition):
        self.partition = partition
        self.sums: dict[int, Tensor] = {}

    def add(self, branch: int, values: Tensor) -> None:
        """Add values [samples, heads] to a branch."""
        values = values.detach().double()
        self.sums[branch] = self.sums[branch] + values if branch in self.sums else values

    def add_gradients(
        self, branch: int, module: nn.Module, axis: HeadAxis, x: Tensor, grad: Tensor, score: str
    ) -> None:
        """Add one layer's score from its input [samples, tokens, I] and its output's gradient [samples, tokens, O]."""
        # A sample's weight gradient is as large as the weight: so many samples at a time as stay within a budget.
        chunk = max(1, _GRADIENT_ELEMENTS // module.weight.numel())
        parts = []
        for x_part, grad_part in zip(x.split(chunk), grad.split(chunk), strict=True):
            x_part = wide(x_part)
            weight = x_part.mT @ grad_part if axis.transposed else grad_part.mT @ x_part
            parts.append(_by_head(_measure(weight, module.weight, score), axis))
        self.add(branch, torch.cat(parts))
        if axis.kind == "column" and module.bias is not None and module.bias.requires_grad:
            bias = _measure(grad.sum(1), module.bias, score)
            self.add(branch, _by_head(bias, HeadAxis("column", axis.layout)))

    def by_subnet(self) -> np.ndarray:
        """float [samples, K]"""
        sums = {index: values.cpu().numpy() for index, values in self.sums.items()}
        scores = np.zeros((len(next(iter(sums.values()))), self.partition.num_scheduled))
        for subnet in self.partition.subnets:
            for index, values in sums.items():
                if self.partition.branches[index].block == subnet.block:
                    scores[:, subnet.index] += values[:, list(subnet.heads)].sum(1)
        return scores


def _by_sample(values: Tensor, samples: int) -> Tensor:
    """Rows as [samples, rows of each, features]: some blocks hand them on in one axis (OPT), or in more (latents)."""
    return values if values.ndim == 3 else values.reshape(samples, -1, values.shape[-1])


def _measure(gradient: Tensor, parameter: Tensor, score: str) -> Tensor:
    if score == "fisher":
        return gradient.square()
    return (gradient if score == "gradient_magnitude" else gradient * parameter.detach()).abs()


def _whole(weight: Tensor) -> Tensor:
    """A weight of which each process holds a part (FSDP), gathered: every process takes its magnitude alike."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _by_head(values: Tensor, axis: HeadAxis) -> Tensor:
    """Sum values [samples, ...] in the shape of a weight (or bias) over all but samples and heads: [samples, heads]."""
    position = 1 + (axis.axis if values.ndim > 2 else 0)
    layout = axis.layout
    dtype = wide(values.new_empty(0)).dtype
    parts = values.split([layout.heads * width for width in layout.part_widths], position)
    by_head = [part.unflatten(position, (layout.heads, -1)).movedim(position, 1) for part in parts]
    return torch.stack([part.flatten(2).sum(2, dtype=dtype) for part in by_head]).sum(0)


def _carriers(base: nn.Module, projection: Projection) -> list[tuple[nn.Module, HeadAxis]]:
    """The linear layers whose trained weights belong to the heads of a projection."""
    module = base.get_submodule(projection.name)
    if isinstance(module, LoraLayer):
        factors = module.lora_B if projection.kind == "column" else module.lora_A
        layers = [factors[name] for name in module.active_adapters if name in factors]
        axis = HeadAxis(projection.kind, projection.layout)
    else:
        layers = [module.active_layer() if isinstance(module, D2FTLayer) else module]
        axis = HeadAxis(projection.kind, projection.layout, projection.transposed)
    return [(layer, axis) for layer in layers if layer.weight.requires_grad]


@contextmanager
def _record(modules: list[nn.Module]) -> Iterator[list]:
    """Note (input, output) of each module's next call; None where it is not called."""
    records: list = [None] * len(modules)

    def hook(position):
        def note(module: nn.Linear | Conv1D, args: tuple, output: Tensor) -> None:
            records[position] = (args[0].detach(), output)

        return note

    handles = [module.register_forward_hook(hook(position)) for position, module in enumerate(modules)]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
