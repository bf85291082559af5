"""What a schedule costs: FLOPs of every subnet and operation, from the shapes of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .operations import Operation
from .schedule import Schedule


@dataclass(frozen=True)
class Chain:
    """Blocks of which each reads what the one before it returns: a stack of a model.

    Attributes:
        first: Index of its first block.
        size: Number of its blocks.
        below_trains: Whether anything trains on the way into its first block, other blocks left out.
        reads: What enters it besides inputs of its own: ``"inputs"``: nothing; ``"before"``: what the chains before it
            return, at its first block; ``"states"``: that of the chain before it, at attention in every block.
    """

    first: int
    size: int
    below_trains: bool = False
    reads: str = "inputs"


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
        chains: The stacks, in the order in which they run; by default all blocks are one.
        states_gradient: The part of `backward` for what cross attention reads of another chain, [K]; not computed where
            nothing learns there. None for nothing.
        shared_states_gradient: The part of `shared_backward` for it, [B].
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
    chains: tuple[Chain, ...] = ()
    states_gradient: np.ndarray | None = None
    shared_states_gradient: np.ndarray | None = None

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
        num_blocks = len(self.shared_forward)
        in_block = (self.blocks[:, None] == np.arange(num_blocks)).astype(float)
        has_full, has_forward_only = full @ in_block > 0, (active & ~full) @ in_block > 0
        inside, weight_gradients, products = (
            np.zeros(num_blocks) if given is None else given
            for given in (self.inside_forward, self.inside_weight_gradient, self.inside_products)
        )
        flops = self.below_forward + self.above_forward + self.above_weight_gradient + self.below_backward
        flops = flops + active @ self.forward + inside.sum() + weight_gradients.sum()
        flops += has_full @ self.shared_forward + has_forward_only @ self.shared_forward
        back = self._goes_back(full, in_block, inside + products, weight_gradients)
        flops += (full & back.blocks[:, self.blocks]) @ self.backward + back.blocks @ self.shared_backward
        flops += back.inside + self.above_input_gradient * back.any - back.spared
        return np.where(active.any(axis=1), flops, 0.0)

    def _goes_back(
        self, full: np.ndarray, in_block: np.ndarray, inside: np.ndarray, weight_gradients: np.ndarray
    ) -> _Backward:
        """Where backward passes run: inputs need gradients from the head down to the lowest block of each chain in
        which, or below which, something trains."""
        learning = (full if self.learns is None else full & self.learns[self.blocks]) @ in_block > 0  # [N, B]
        has_full, rows = full @ in_block > 0, len(full)
        back = _Backward(np.zeros_like(has_full), np.zeros(rows), np.zeros(rows, dtype=bool), np.zeros(rows))
        chains = self.chains or (Chain(0, len(inside), self.below_trains),)
        inside_entry = np.zeros(len(inside)) if self.inside_entry_gradient is None else self.inside_entry_gradient
        # Whether anything learned in what ran until here; a decoder alone may have a trained encoder below it.
        before = np.full(rows, chains[0].below_trains)
        for chain, following in zip(chains, (*chains[1:], None), strict=True):
            end = chain.first + chain.size
            of_chain = np.arange(chain.first, end)
            lowest_full = _first(learning[:, of_chain], chain.first)
            lowest_inside = next((chain.first + i for i in np.flatnonzero(weight_gradients[of_chain])), end)
            reads = before & (chain.reads != "inputs")
            lowest = np.minimum(lowest_full, lowest_inside)
            if chain.reads == "states":  # gradients enter with the first heads that do not hold them back
                lowest = np.minimum(lowest, np.where(reads, _first(has_full[:, of_chain], chain.first), end))
            elif chain.reads == "before":
                lowest = np.where(reads, chain.first, lowest)
            lowest = np.where(chain.below_trains, chain.first, lowest)
            if following is not None and following.reads == "states":  # gradients come by heads that do not hold them
                reached = has_full[:, following.first : following.first + following.size].any(axis=1)
                lowest, lowest_full = (np.where(reached, at, end) for at in (lowest, lowest_full))
            runs = back.blocks[:, of_chain] = has_full[:, of_chain] & (of_chain >= lowest[:, None])
            above = np.append(np.cumsum(inside[of_chain][::-1])[::-1], 0.0)
            back.inside += above[lowest - chain.first]
            back.any |= lowest < end
            own_input = reads & (chain.reads == "before") | chain.below_trains
            entry = full & (self.blocks == lowest_full[:, None])
            shared, before_subnets = (
                np.append(given, 0.0)[lowest_full] for given in (self.shared_entry_gradient, inside_entry)
            )
            # What trains inside the block wants the gradient of the subnets' input where it lies before them.
            alone = np.where(before_subnets > 0, lowest_full < lowest_inside, lowest_full <= lowest_inside)
            spared = (lowest_full < end) & alone & ~own_input
            back.spared += (entry @ self.entry_gradient + shared + before_subnets) * spared
            if chain.reads == "states" and self.states_gradient is not None:
                cells = full & np.isin(self.blocks, of_chain) & back.blocks[:, self.blocks]
                states = cells @ self.states_gradient + runs @ self.shared_states_gradient[of_chain]
                back.spared += states * ~before
            before = before | (lowest < end)
        return back


def _first(marks: np.ndarray, offset: int) -> np.ndarray:
    """Index of the first mark in each row of bool [N, B], counted from `offset`; where there is none, one past the last
    block."""
    return offset + np.where(marks.any(axis=1), marks.argmax(axis=1), marks.shape[1])


@dataclass
class _Backward:
    """What backward passes do in each of N rows of operations.

    Attributes:
        blocks: Blocks that they reach, bool [N, B].
        inside: FLOPs for inputs of what blocks run whole, [N].
        any: Whether there is one at all, bool [N].
        spared: FLOPs for inputs in which nobody is interested, [N].
    """

    blocks: np.ndarray
    inside: np.ndarray
    any: np.ndarray
    spared: np.ndarray
