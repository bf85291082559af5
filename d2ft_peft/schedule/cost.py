"""What a schedule costs: FLOPs of every subnet and operation, from the shapes of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .operations import Operation
from .schedule import Schedule


@dataclass(frozen=True, eq=False)
class CostModel:
    """FLOPs per sample (one image, one sequence) of K subnets in B blocks and of what lies around them.

    Attributes:
        blocks: Block of each subnet, int [K].
        forward: Forward pass of each subnet, [K].
        backward: Its backward pass, for activations and trained weights, [K].
        entry_gradient: The part of `backward` for the block's input, [K]; not computed in the lowest block that
            trains, where nothing below it does.
        shared_forward: What a block computes once per pass, whatever the number of heads (LoRA's shared factors), [B].
        shared_backward: The same for backward, [B].
        shared_entry_gradient: The part of `shared_backward` for the block's input, [B].
        below_forward: Embeddings.
        below_backward: Their backward pass; 0 where they do not train.
        inside_forward: What each block runs whole besides its subnets (experts, router), [B]; None for nothing.
        inside_weight_gradient: Gradient of its weights, [B]; 0 where they do not train. That of its input costs as much
            as `inside_forward`, where anything below trains.
        inside_products: The part of `inside_forward` that multiplies activations with each other, whose gradient costs
            as much once more, [B]; None for nothing.
        inside_entry_gradient: What of the gradients inside a block lies before its subnets (linear attention before an
            FFN), [B]: not computed in the lowest block that trains; None for nothing.
        above_forward: Task head.
        above_weight_gradient: Gradient of its weights; 0 where it does not train.
        above_input_gradient: Gradient of its input.
        below_trains: Whether anything below the blocks trains.
        learns: Whether the subnets of each block have weights that train, bool [B]; None where all have. Below the
            lowest block that learns from a micro-batch no backward pass runs.
        forward_only_cost: Cost of FORWARD_ONLY relative to FULL that schedules are made with (the paper: 0.4), or
            None for the model's own.
    """

    blocks: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    entry_gradient: np.ndarray
    shared_forward: np.ndarray
    shared_backward: np.ndarray
    shared_entry_gradient: np.ndarray
    below_forward: float = 0.0
    below_backward: float = 0.0
    inside_forward: np.ndarray | None = None
    inside_weight_gradient: np.ndarray | None = None
    inside_products: np.ndarray | None = None
    inside_entry_gradient: np.ndarray | None = None
    above_forward: float = 0.0
    above_weight_gradient: float = 0.0
    above_input_gradient: float = 0.0
    below_trains: bool = False
    learns: np.ndarray | None = None
    forward_only_cost: float | None = None

    @property
    def costs(self) -> np.ndarray:
        """FLOPs per sample of each operation, [K, 3] with columns by `Operation`; what a block shares is spread over
        its subnets. This is what policies see: additive, the same in every micro-batch."""
        subnets_in_block = np.bincount(self.blocks, minlength=len(self.shared_forward))
        share = 1 / subnets_in_block[self.blocks]
        forward = self.forward + share * self.shared_forward[self.blocks]
        full = forward + self.backward + share * self.shared_backward[self.blocks]
        table = np.zeros((len(self.blocks), len(Operation)))
        table[:, Operation.FULL] = full
        table[:, Operation.FORWARD_ONLY] = forward if self.forward_only_cost is None else self.forward_only_cost * full
        return table

    def with_blocks(self, blocks: Sequence[int], other: CostModel) -> CostModel:
        """These costs, with those of `other` (the same model on other samples) in some blocks."""
        of_block = np.isin(np.arange(len(self.shared_forward)), blocks)
        changed = {}
        for name in ("forward", "backward", "entry_gradient"):
            changed[name] = np.where(of_block[self.blocks], getattr(other, name), getattr(self, name))
        for name in (
            "shared_forward", "shared_backward", "shared_entry_gradient", "inside_forward", "inside_weight_gradient",
            "inside_products", "inside_entry_gradient",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                changed[name] = np.where(of_block, getattr(other, name), getattr(self, name))
        return replace(self, **changed)

    def step_flops(self, operations: np.ndarray, samples: np.ndarray) -> float:
        """FLOPs of a step, exactly: with the passes that blocks share, the embeddings and head of the micro-batches
        that run, and without the input gradient that the lowest trained block does not need.

        Args:
            operations: Operation of each cell, int [N, K].
            samples: Size of each micro-batch in samples, [N].
        """
        return float(np.asarray(samples, dtype=float) @ self._row_flops(np.asarray(operations)))

    def full_flops(self, samples: np.ndarray) -> float:
        """FLOPs of a step in which every cell is FULL."""
        return self.step_flops(np.full((len(samples), len(self.blocks)), Operation.FULL), samples)

    def forward_flops(self, samples: float) -> float:
        """FLOPs of a forward pass of the whole model."""
        inside = 0.0 if self.inside_forward is None else self.inside_forward.sum()
        blocks = self.forward.sum() + self.shared_forward.sum() + inside
        return samples * float(self.below_forward + blocks + self.above_forward)

    def forward_below(self, operations: np.ndarray, block: int) -> float:
        """Forward FLOPs per sample of the blocks below `block` in a row of operations, int [K]."""
        active = (np.asarray(operations) != Operation.SHORTCUT) & (self.blocks < block)
        runs = np.isin(np.arange(len(self.shared_forward)), self.blocks[active])
        inside = 0.0 if self.inside_forward is None else self.inside_forward[:block].sum()
        return float(active @ self.forward + runs @ self.shared_forward + inside)

    def schedule_flops(self, schedule: Schedule) -> float:
        """FLOPs of a schedule whose weights are samples."""
        return self.step_flops(schedule.operations, schedule.weights)

    def means(self, schedules: Sequence[Schedule]) -> dict[str, float]:
        """Means over the schedules of some steps, at least one: ``compute_ratio`` and ``communication_ratio`` of the
        subnets, ``flops_ratio`` with embeddings and head, ``workload_variance`` over devices, ``step_flops``."""
        flops = np.array([self.schedule_flops(schedule) for schedule in schedules])
        full = np.array([self.full_flops(schedule.weights) for schedule in schedules])
        ratios = ("compute_ratio", "communication_ratio", "workload_variance")
        return {name: float(np.mean([getattr(schedule, name) for schedule in schedules])) for name in ratios} | {
            "flops_ratio": float(flops.sum() / full.sum()),
            "step_flops": float(flops.mean()),
        }

    def _row_flops(self, operations: np.ndarray) -> np.ndarray:
        """FLOPs per sample of each row, [N]."""
        full, active = operations == Operation.FULL, operations != Operation.SHORTCUT
        learning = full if self.learns is None else full & self.learns[self.blocks]
        runs, trains = active.any(axis=1), learning.any(axis=1)
        in_block = (self.blocks[:, None] == np.arange(len(self.shared_forward))).astype(float)
        has_full, has_forward_only = full @ in_block > 0, (active & ~full) @ in_block > 0
        num_blocks = len(self.shared_forward)
        inside, weight_gradients, products = (
            np.zeros(num_blocks) if given is None else given
            for given in (self.inside_forward, self.inside_weight_gradient, self.inside_products)
        )
        flops = self.below_forward + self.above_forward + self.above_weight_gradient + self.below_backward
        # Inputs need gradients from the head down to the lowest block in which, or below which, something trains.
        lowest_full = np.where(trains, (learning @ in_block > 0).argmax(axis=1), num_blocks)
        lowest_inside = next(iter(np.flatnonzero(weight_gradients)), num_blocks)
        lowest = np.minimum(lowest_full, lowest_inside) * (not self.below_trains)
        goes_back = has_full & (np.arange(num_blocks) >= lowest[:, None])
        flops = flops + active @ self.forward + inside.sum() + weight_gradients.sum()
        flops += (full & goes_back[:, self.blocks]) @ self.backward + goes_back @ self.shared_backward
        flops += has_full @ self.shared_forward + has_forward_only @ self.shared_forward
        inside_above = np.append(np.cumsum((inside + products)[::-1])[::-1], 0.0)
        flops += inside_above[lowest] + self.above_input_gradient * (lowest < num_blocks)
        if not self.below_trains:
            spared = trains & (lowest_full <= lowest_inside)
            entry = full & (self.blocks == lowest_full[:, None])
            shared_entry = np.append(self.shared_entry_gradient, 0.0)[lowest_full]
            flops -= (entry @ self.entry_gradient + shared_entry) * spared
            if self.inside_entry_gradient is not None:
                before = np.append(self.inside_entry_gradient, 0.0)[lowest_full]
                flops -= before * (trains & (lowest_full < lowest_inside))
        return np.where(runs, flops, 0.0)
