"""The cost model of a model: the FLOPs of its subnets from their shapes, and of what lies around them by one look."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from peft.tuners.lora import LoraLayer
from torch import nn

from ..partition import Branch, Partition, Projection, base_model, unwrap
from ..partition.body import attention_kernel
from ..schedule import Chain, CostModel
from ..tuners.layer import D2FTLayer
from .measured_blocks import blocks_that_learn, cost_of_whole_blocks, trains_below
from .seen import Entry, Probe


# Backward FLOPs of the attention products per forward FLOP: fused kernels compute the scores a second time.
_ATTENTION_BACKWARD = {"eager": 2.0}
_FUSED_ATTENTION_BACKWARD = 2.5

# What is known of a block: forward and backward, and of the latter what its input and what cross attention reads take.
_PARTS = ("forward", "backward", "entry", "states")


def cost_model(
    model: nn.Module,
    partition: Partition,
    probe: Probe,
    forward_only_cost: float | None = None,
    without: frozenset[str] = frozenset(),
) -> CostModel:
    """FLOPs per sample of a model's subnets, full fine-tuning and LoRA alike, as its layers are now.

    A linear layer of I inputs and O outputs takes 2 I O FLOPs per token forward, as many for the gradient of its
    input, and as many again for that of its weight where it trains; attention takes 4 T d per token and head forward.

    Args:
        model: The adapted (or plain) model.
        partition: Its subnets.
        probe: What one sample showed, see `probe_model`.
        forward_only_cost: Relative cost of FORWARD_ONLY to make schedules with, instead of the model's own.
        without: Projections, attention modules and modules of the head that count for nothing: what a row costs that
            they leave out.
    """
    if not partition.cuts_heads:
        return cost_of_whole_blocks(model, partition, probe, forward_only_cost, without)
    base, shape = base_model(model), len(partition.blocks)
    blocks = partition.subnet_blocks
    kernels = [attention_kernel(base, stack.name) for stack in partition.stacks]
    attention_backward = [_ATTENTION_BACKWARD.get(kernel, _FUSED_ATTENTION_BACKWARD) for kernel in kernels]
    first = {branch.block: branch for branch in reversed(partition.branches)}
    per_head = {name: np.zeros(shape) for name in _PARTS}
    shared = {name: np.zeros(shape) for name in _PARTS}
    for branch in partition.branches:
        is_entry = branch is first[branch.block]
        rows = probe.rows_of(partition, branch)
        products = 4.0 * rows.own * rows.attended * branch.query_width * (branch.region not in without)
        per_head["forward"][branch.block] += products
        per_head["backward"][branch.block] += products * attention_backward[partition.stack_of(branch.block)]
        for projection in (p for p in branch.projections if p.name not in without):
            count = rows.other if projection.name in branch.other_input else rows.own
            _add_projection(base, branch, projection, count, is_entry, per_head, shared)
        for name in branch.whole:
            if name not in without:
                _add_whole(base.get_submodule(name), branch, rows.own, is_entry, shared)
    learns = blocks_that_learn(base, partition)
    attends = np.isin(range(shape), [branch.block for branch in partition.branches if branch.name != "ffn"])
    heads = np.array([len(subnet.heads) for subnet in partition.subnets])
    left_out = tuple(f"{name}." for name in without)
    above = [entry for entry in probe.above if not f"{entry.name}.".startswith(left_out)]
    chains = _chains(base, partition)
    if not any(chain.below_trains for chain in chains):
        _without_backward_below(partition, probe, learns, per_head, shared)
    return CostModel(
        blocks=blocks,
        forward=per_head["forward"][blocks] * heads,
        backward=per_head["backward"][blocks] * heads,
        entry_gradient=per_head["entry"][blocks] * heads,
        shared_forward=shared["forward"],
        shared_backward=shared["backward"],
        shared_entry_gradient=shared["entry"],
        below_forward=sum(entry.flops for entry in probe.below),
        below_backward=_backward_below(probe.below),
        inside_forward=_of_blocks(probe, shape, lambda entry: entry.flops),
        inside_weight_gradient=_of_blocks(probe, shape, lambda entry: entry.trains * (entry.flops - entry.products)),
        inside_products=_of_blocks(probe, shape, lambda entry: entry.products),
        inside_entry_gradient=_of_blocks(probe, shape, lambda entry: entry.flops + entry.products) * ~attends,
        above_forward=sum(entry.flops for entry in above),
        above_weight_gradient=sum(entry.flops for entry in above if entry.trains),
        above_input_gradient=sum(entry.flops for entry in above),
        below_trains=chains[0].below_trains,
        learns=learns,
        forward_only_cost=forward_only_cost,
        chains=chains,
        states_gradient=per_head["states"][blocks] * heads,
        shared_states_gradient=shared["states"],
    )


def _chains(base: nn.Module, partition: Partition) -> tuple[Chain, ...]:
    """The stacks, and whether anything trains on the way into each."""
    return tuple(
        Chain(stack.first, stack.size, trains_below(base, partition, stack), stack.reads) for stack in partition.stacks
    )


def _backward_below(below: list[Entry]) -> float:
    """Backward FLOPs before the blocks: of weights that train, and of inputs above the first of them."""
    total, gradient = 0.0, False
    for entry in below:
        total += entry.flops * (entry.trains + gradient)
        gradient |= entry.trains
    return total


def _without_backward_below(
    partition: Partition, probe: Probe, learns: np.ndarray, per_head: dict, shared: dict
) -> None:
    """Take the backward pass out of the blocks below the lowest in which anything trains: none ever runs there."""
    inside = _of_blocks(probe, len(partition.blocks), lambda entry: entry.trains * entry.flops) > 0
    below = np.cumsum(learns | inside) == 0
    for costs in (per_head, shared):
        costs["backward"][below] = costs["entry"][below] = 0.0


def _of_blocks(probe: Probe, num_blocks: int, flops: Callable[[Entry], float]) -> np.ndarray:
    """Sum over the entries of each block, [B]."""
    return np.array([sum(map(flops, probe.inside.get(block, ()))) for block in range(num_blocks)], dtype=float)


def _add_projection(
    base: nn.Module,
    branch: Branch,
    projection: Projection,
    rows: float,
    is_entry: bool,
    per_head: dict,
    shared: dict,
) -> None:
    """Add one projection's FLOPs on some rows: what one head owns, and what its block computes once per pass.

    The gradient of its input counts as the block's where its branch is the first there (`is_entry`). In blocks whose
    FFN runs beside attention that of the FFN would too: the lowest one is taken for dearer than it is.
    """
    module, block = base.get_submodule(projection.name), branch.block
    dense = 2.0 * rows * projection.in_features * projection.out_features / branch.heads
    is_entry = is_entry and projection.kind == "column"
    reads_states = projection.name in branch.other_input
    trains = isinstance(module, D2FTLayer) and any(p.requires_grad for p in module.parameters())
    trains = trains or (not isinstance(module, D2FTLayer | LoraLayer) and _trains(module))
    per_head["forward"][block] += dense
    per_head["backward"][block] += dense * (1 + trains)
    per_head["entry"][block] += dense * is_entry
    per_head["states"][block] += dense * reads_states
    if not isinstance(module, LoraLayer):
        return
    for adapter in module.active_adapters:
        if adapter not in module.lora_A:
            continue
        rank, column = module.r[adapter], projection.kind == "column"
        owned, common = (
            2.0 * rows * rank * size
            for size in (projection.out_features, projection.in_features)[:: 1 if column else -1]
        )
        per_head["forward"][block] += owned / branch.heads
        per_head["backward"][block] += 2 * owned / branch.heads
        shared["forward"][block] += common
        shared["backward"][block] += 2 * common
        shared["entry"][block] += common * is_entry
        shared["states"][block] += common * reads_states


def _trains(module: nn.Module) -> bool:
    return getattr(module, "weight", None) is not None and module.weight.requires_grad


def _add_whole(module: nn.Module, branch: Branch, rows: float, is_entry: bool, shared: dict) -> None:
    """Add the FLOPs on some rows of a projection that every pass of its region computes whole."""
    layer = unwrap(module)
    weight = getattr(layer, "weight", None)  # HQQ has none under this name, and packed ones have fewer entries
    size = layer.in_features * layer.out_features if hasattr(layer, "in_features") else weight.numel()
    dense, trains = 2.0 * rows * size, weight is not None and weight.requires_grad
    if isinstance(module, D2FTLayer):
        trains = any(p.requires_grad for p in module.parameters())
    forward, backward = dense, dense * (1 + trains)
    if isinstance(module, LoraLayer):
        names = [name for name in module.active_adapters if name in module.lora_A]
        factors = [part[name].weight for part in (module.lora_A, module.lora_B) for name in names]
        low_rank = 2.0 * rows * sum(factor.numel() for factor in factors)
        forward, backward = forward + low_rank, backward + 2 * low_rank
    shared["forward"][branch.block] += forward
    shared["backward"][branch.block] += backward
    shared["entry"][branch.block] += dense * is_entry
