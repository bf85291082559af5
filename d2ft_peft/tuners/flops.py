"""The cost model of a model: the FLOPs of its subnets from their shapes, and of what lies around them by one look."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..partition import Branch, Partition, Projection
from ..schedule import CostModel
from .layer import D2FTLayer


# Backward FLOPs of the attention products per forward FLOP: fused kernels compute the scores a second time.
_ATTENTION_BACKWARD = {"eager": 2.0}
_FUSED_ATTENTION_BACKWARD = 2.5


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


def cost_model(
    model: nn.Module, partition: Partition, probe: Probe, forward_only_cost: float | None = None
) -> CostModel:
    """FLOPs per sample of a model's subnets, full fine-tuning and LoRA alike, as its layers are now.

    A linear layer of I inputs and O outputs takes 2 I O FLOPs per token forward, as many for the gradient of its
    input, and as many again for that of its weight where it trains; attention takes 4 T d per token and head forward.

    Args:
        model: The adapted (or plain) model.
        partition: Its subnets.
        probe: What one sample showed, see `probe_model`.
        forward_only_cost: Relative cost of FORWARD_ONLY to make schedules with, instead of the model's own.
    """
    base, tokens = base_model(model), probe.sequence_length
    blocks, shape = partition.subnet_blocks, len(partition.blocks)
    attention_backward = _ATTENTION_BACKWARD.get(model.config._attn_implementation, _FUSED_ATTENTION_BACKWARD)
    per_head = {name: np.zeros(shape) for name in ("forward", "backward", "entry")}
    shared = {name: np.zeros(shape) for name in ("forward", "backward", "entry")}
    for branch in partition.branches:
        products = 4.0 * tokens * branch.query_width
        per_head["forward"][branch.block] += products
        per_head["backward"][branch.block] += products * attention_backward
        for projection in branch.projections:
            _add_projection(base, branch, projection, per_head, shared)
    heads = np.array([len(subnet.heads) for subnet in partition.subnets])
    below_trains = any(p.requires_grad for name in _below(partition) for p in base.get_submodule(name).parameters())
    return CostModel(
        blocks=blocks,
        forward=tokens * per_head["forward"][blocks] * heads,
        backward=tokens * per_head["backward"][blocks] * heads,
        entry_gradient=tokens * per_head["entry"][blocks] * heads,
        shared_forward=tokens * shared["forward"],
        shared_backward=tokens * shared["backward"],
        shared_entry_gradient=tokens * shared["entry"],
        below_forward=sum(flops for flops, _ in probe.below),
        below_backward=sum(flops for flops, trains in probe.below if trains),
        above_forward=sum(flops for flops, _ in probe.above),
        above_weight_gradient=sum(flops for flops, trains in probe.above if trains),
        above_input_gradient=sum(flops for flops, _ in probe.above),
        below_trains=below_trains,
        forward_only_cost=forward_only_cost,
    )


def _add_projection(base: nn.Module, branch: Branch, projection: Projection, per_head: dict, shared: dict) -> None:
    """Add one projection's FLOPs per token: what one head owns, and what its block computes once per pass."""
    module, block = base.get_submodule(projection.name), branch.block
    dense = 2.0 * projection.in_features * projection.out_features / branch.heads
    is_entry = branch.name == "attention" and projection.kind == "column"
    trains = isinstance(module, D2FTLayer) and any(p.requires_grad for p in module.parameters())
    trains = trains or (not isinstance(module, D2FTLayer | LoraLayer) and module.weight.requires_grad)
    per_head["forward"][block] += dense
    per_head["backward"][block] += dense * (1 + trains)
    per_head["entry"][block] += dense * is_entry
    if not isinstance(module, LoraLayer):
        return
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        rank, column = module.r[adapter], projection.kind == "column"
        owned, common = (
            2.0 * rank * size for size in (projection.out_features, projection.in_features)[:: 1 if column else -1]
        )
        per_head["forward"][block] += owned / branch.heads
        per_head["backward"][block] += 2 * owned / branch.heads
        shared["forward"][block] += common
        shared["backward"][block] += 2 * common
        shared["entry"][block] += common * is_entry


def _below(partition: Partition) -> list[str]:
    """Boundary modules before the blocks: those that the first block's boundary follows in the model's own order."""
    inside = (i for i, name in enumerate(partition.boundary) if name.startswith(partition.blocks[0] + "."))
    first = next(inside, 0)
    return list(partition.boundary[:first])


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


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model under PEFT's wrapper, whose paths the partition names."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
