"""The cost model of whole blocks: nothing is known of their shapes, so what they computed for one sample is taken."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from ..partition import Partition, Stack, base_model, boundary_below, boundary_parameters
from ..schedule import CostModel
from .seen import Entry, Probe


def cost_of_whole_blocks(
    model: nn.Module,
    partition: Partition,
    probe: Probe,
    forward_only_cost: float | None = None,
    without: frozenset[str] = frozenset(),
) -> CostModel:
    """FLOPs per sample of a model whose blocks are its subnets.

    Backward takes as much as forward for the gradient of inputs, as much again where products of activations
    (attention) have two of them, and as much again for the gradient of weights where they train. What scans and other
    elementwise operations take is not counted.

    Args:
        model: The adapted (or plain) model.
        partition: Its subnets.
        probe: What one sample showed, see `probe_model`.
        forward_only_cost: Relative cost of FORWARD_ONLY to make schedules with, instead of the model's own.
        without: Modules of the head that count for nothing: what a row costs that they leave out.
    """
    base, shape = base_model(model), len(partition.blocks)
    inside = [probe.inside.get(block, []) for block in range(shape)]
    # Where only the length of sequences is known so far, blocks cost alike, and in proportion to it.
    unseen = 0.0 if any(inside) else float(probe.sequence_length)
    forward = np.array([_forward(entries) + unseen for entries in inside])
    backward = np.array([_backward(entries) + unseen for entries in inside])
    learns, below_trains = blocks_that_learn(base, partition), trains_below(base, partition)
    if not below_trains:
        backward[np.cumsum(learns) == 0] = 0.0  # below the lowest block that learns none ever runs
    left_out = tuple(f"{name}." for name in without)
    above = [entry for entry in probe.above if not f"{entry.name}.".startswith(left_out)]
    nothing = np.zeros(shape)
    return CostModel(
        blocks=partition.subnet_blocks,
        forward=forward,
        backward=backward,
        entry_gradient=nothing,
        shared_forward=nothing,
        shared_backward=nothing,
        shared_entry_gradient=nothing,
        below_forward=_forward(probe.below),
        below_backward=_forward([entry for entry in probe.below if entry.trains]),
        above_forward=_forward(above),
        above_weight_gradient=_forward([entry for entry in above if entry.trains]),
        above_input_gradient=_forward(above),
        below_trains=below_trains,
        learns=learns,
        forward_only_cost=forward_only_cost,
    )


def blocks_that_learn(base: nn.Module, partition: Partition) -> np.ndarray:
    """Whether the subnets of each block have weights that train, bool [B]."""
    learns = np.zeros(len(partition.blocks), dtype=bool)
    for branch in partition.branches:
        modules = [base.get_submodule(name) for name in branch.owned]
        learns[branch.block] |= any(p.requires_grad for module in modules for p in module.parameters())
    return learns


def trains_below(base: nn.Module, partition: Partition, stack: Stack | None = None) -> bool:
    """Whether anything on the way into a stack trains, see `boundary_below`."""
    below = boundary_below(base, partition, stack)
    return any(p.requires_grad for name in below for p in boundary_parameters(base, partition, name))


def _forward(entries: Sequence[Entry]) -> float:
    return float(sum(entry.flops for entry in entries))


def _backward(entries: Sequence[Entry]) -> float:
    return float(sum(entry.flops + entry.products + entry.flops * entry.trains for entry in entries))
