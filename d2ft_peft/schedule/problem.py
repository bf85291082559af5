"""What a policy gets: scores, costs, sizes and the budget of one training step."""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ..value_checks import check_integer
from ._arrays import freeze, real_array, shape_of
from .budget import Budget
from .knapsack import integer_values
from .operations import COMMUNICATION
from .schedule import Schedule, check_blocks, check_costs, check_devices, check_weights


TIE_BREAKS = ("aligned", "spread")


@dataclass(frozen=True, eq=False)
class Problem:
    """Numbers from which a policy makes a `Schedule`; N micro-batches, K subnets, M devices.

    Attributes:
        forward_scores: float [N, K], contribution of a cell's forward pass (paper, section 3: Fisher information),
            not negative.
        backward_scores: float [N, K], contribution of a cell's backward pass (weight magnitude), not negative.
        budget: the work that the step may do.
        costs, weights, devices, blocks: as in `Schedule`, with the same defaults.
        tie_break: who wins among choices of exactly equal value. "aligned": the micro-batch with the highest total
            score, on every device the same; "spread": that order rotated by the number of the device.
        rng: source of randomness of the policies that need one.
        seed, step, interval: the seed of the run, the number of the optimizer step, and the number of steps for which
            a policy keeps a choice that it does not make anew at every step.

    Raises:
        ValueError: a wrong shape or value, or a budget under which nothing could train.
    """

    forward_scores: np.ndarray
    backward_scores: np.ndarray
    budget: Budget
    costs: np.ndarray = None
    weights: np.ndarray = None
    devices: np.ndarray = None
    blocks: np.ndarray = None
    tie_break: Literal["aligned", "spread"] = "aligned"
    rng: np.random.Generator | None = None
    seed: int = 0
    step: int = 0
    interval: int = 1

    def __post_init__(self):
        shape = shape_of("forward_scores", self.forward_scores)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"forward_scores has shape {shape}, it must be [micro-batches, subnets], both at least 1")
        advice = "give the contribution of every (micro-batch, subnet)"
        for field in ("forward_scores", "backward_scores"):
            object.__setattr__(self, field, real_array(field, getattr(self, field), shape, advice))
        object.__setattr__(self, "weights", check_weights(self.weights, shape[0]))
        object.__setattr__(self, "devices", check_devices(self.devices, shape[1]))
        object.__setattr__(self, "costs", check_costs(self.costs, shape[1]))
        object.__setattr__(self, "blocks", check_blocks(self.blocks, shape[1]))
        if not isinstance(self.tie_break, str) or self.tie_break not in TIE_BREAKS:
            raise ValueError(f"tie_break={self.tie_break!r} must be one of {TIE_BREAKS}")
        if self.rng is not None and not isinstance(self.rng, np.random.Generator):
            raise ValueError(f"rng={self.rng!r} must be a numpy Generator or None; use numpy.random.default_rng(seed)")
        for name, minimum in (("seed", 0), ("step", 0), ("interval", 1)):
            value = getattr(self, name)
            check_integer(name, value, minimum)
        if not isinstance(self.budget, Budget):
            raise ValueError(f"budget={self.budget!r} must be a Budget")
        self.budget.check(self.costs, self.weights, self.devices)

    @property
    def num_micro_batches(self) -> int:
        """N, the number of micro-batches."""
        return self.forward_scores.shape[0]

    def rng_for(self, policy: str) -> np.random.Generator:
        """The source of randomness. Raises ValueError, which names the policy that draws, if there is none."""
        if self.rng is None:
            raise ValueError(
                f"rng=None: the {policy} policy needs a source of randomness; give np.random.default_rng(seed)"
            )
        return self.rng

    def interval_rng(self) -> np.random.Generator:
        """A source of randomness that draws the same at every step of an interval."""
        return np.random.default_rng([self.seed, self.step // self.interval])

    @property
    def num_subnets(self) -> int:
        """K, the number of subnets."""
        return self.forward_scores.shape[1]

    @property
    def num_devices(self) -> int:
        """M, the number of devices."""
        return int(self.devices.max()) + 1

    @cached_property
    def limited_costs(self) -> np.ndarray:
        """What the budget limits, per operation and unit of weight: compute, or communication; float [K, 3]."""
        if self.budget.communication is None:
            return self.costs
        return freeze(np.tile(COMMUNICATION, (self.num_subnets, 1)))

    @cached_property
    def limits(self) -> np.ndarray:
        """The most that each device may do, in the unit of limited_costs * weights; float [M]."""
        if self.budget.communication is not None:
            return freeze(self.budget.communication_capacities(self.weights, self.devices))
        return freeze(self.budget.capacities(self.costs, self.weights, self.devices))

    @cached_property
    def preference(self) -> np.ndarray:
        """Micro-batches in the order in which ties prefer them: total score descending, then index; int [N]."""
        # Whole numbers add up exactly, so neither the order of the subnets nor rounding decides between equal rows.
        both = np.concatenate([self.forward_scores, self.backward_scores], axis=1)
        total = integer_values(both.reshape(1, -1, 1)).reshape(both.shape).sum(axis=1)
        return freeze(np.argsort(-total, kind="stable"))

    def order(self, index: int) -> np.ndarray:
        """`preference` as device (for counts: subnet) `index` uses it, rotated if tie_break is "spread"; int [N]."""
        return self.preference if self.tie_break == "aligned" else np.roll(self.preference, -index)

    def schedule(self, operations: ArrayLike) -> Schedule:
        """The `Schedule` with these operations [N, K] and the problem's other facts.

        Capacities are filled in where the budget sets them: for compute shares, and for counts of micro-batches of
        equal weight.

        Raises:
            ValueError: the operations exceed a capacity or have a wrong shape.
        """
        limited = self.budget.communication is None and (
            self.budget.counts is None or bool((self.weights == self.weights[0]).all())
        )
        capacities = self.limits if limited else None
        shape = shape_of("operations", operations)
        if shape != self.forward_scores.shape:
            raise ValueError(f"operations has shape {shape}, it must have shape {self.forward_scores.shape}")
        return Schedule(operations, self.weights, self.devices, self.costs, capacities, self.blocks)

    def pooled(self) -> "Problem":
        """The same problem with all subnets on one device, which may do what the devices may do together."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["devices"] = np.zeros(self.num_subnets, dtype=np.int64)
        if isinstance(self.budget.compute, tuple):
            full = self.weights.sum() * self.costs[:, -1].sum()
            values["budget"] = Budget(compute=(min(1.0, float(self.limits.sum() / full)),))
        return Problem(**values)
