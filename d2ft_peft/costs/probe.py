"""One look at a model: how long its sequences are, and the FLOPs of what lies around the subnets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..partition import Partition, base_model


@dataclass
class Probe:
    """What one sample shows of a model.

    Attributes:
        sequence_length: Tokens that reach the blocks.
        below: Forward FLOPs of every linear layer or convolution before the blocks, and whether it trains.
        above: The same for those after the first block began (task head).
    """

    sequence_length: int = 0
    below: list[tuple[int, bool]] = field(default_factory=list)
    above: list[tuple[int, bool]] = field(default_factory=list)


@torch.no_grad()
def probe_model(model: nn.Module, partition: Partition, batch: dict[str, Tensor]) -> Probe:
    """Run the model on the first sample of `batch` and note lengths and the FLOPs outside of the subnets.

    The model is left as it was: weights, training flags and random state.
    """
    probe = Probe()

    def enter_blocks(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        probe.sequence_length = hidden.shape[1]

    def note(module, args, output):
        weight = module.weight
        positions = output.numel() // (weight.shape[1] if isinstance(module, Conv1D) else weight.shape[0])
        entry = (2 * weight.numel() * positions, weight.requires_grad)
        (probe.above if probe.sequence_length else probe.below).append(entry)

    base = base_model(model)
    inside = tuple(name + "." for name in partition.projections)
    handles = [base.get_submodule(partition.blocks[0]).register_forward_pre_hook(enter_blocks, with_kwargs=True)]
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | Conv1D) and not (name + ".").startswith(
            inside
        ):
            handles.append(module.register_forward_hook(note))
    sample = {name: value[:1] if isinstance(value, Tensor) and value.ndim else value for name, value in batch.items()}
    try:
        with inference(model):
            model(**sample)
    finally:
        for handle in handles:
            handle.remove()
    return probe


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run a model as at inference, then give every module its training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
