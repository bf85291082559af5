"""A schedule on its way to execution: plans, sizes here, and the weight of every micro-batch in the step's loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..engine import compile_plan
from ..partition import Partition
from ..processes import gather, mean_over_processes, world_size
from ..schedule import Schedule
from .account import Account
from .facts import BatchFacts
from .micro_batch import MicroBatch


class PlannedStep:
    """The micro-batches that one schedule covers.

    Args:
        partition: The subnets.
        schedule: Its weights are the sizes of the micro-batches over all processes.
        sizes: Their sizes in this process, [N].
        each_is_a_step: Whether an optimizer step follows each of them instead of the last.

    Attributes:
        micro_batches: What a training loop has to know of each.
        facts: What is known of the content of each, or None.
        plain: FLOPs of this step in plain training in the mean over the processes, where padding tells it apart.
        prices: What the step costs plain training, until the run's account knows of it.
        executed, full: FLOPs of this process, as executed so far, and if the same samples had run FULL everywhere.
        complete: Whether all of it ran.
    """

    def __init__(self, partition: Partition, schedule: Schedule, sizes: np.ndarray, each_is_a_step: bool):
        self.schedule, self.sizes, self.each_is_a_step = schedule, sizes, each_is_a_step
        plans = [compile_plan(partition, row) for row in schedule.operations]
        final = max((i for i, plan in enumerate(plans) if not plan.skipped), default=-1)
        self.micro_batches = [MicroBatch(plan, 1.0, each_is_a_step or i == final) for i, plan in enumerate(plans)]
        self.facts: list[BatchFacts | None] = [None] * len(plans)
        self.plain: float | None = None
        self.prices: Prices | None = None
        self.executed = self.full = 0.0
        self.complete = False
        self.weigh(sizes, schedule.weights)

    def note_facts(self, facts: Sequence[BatchFacts]) -> None:
        """Note what the first micro-batches, in their order, hold."""
        self.facts[: len(facts)] = facts

    def length(self, index: int) -> int | None:
        """Tokens of a sample of a micro-batch, padding included, or None if it is not known."""
        facts = self.facts[index]
        return None if facts is None else facts.length

    def plain_flops(self, index: int) -> float | None:
        """A micro-batch's part, by its samples, of what plain training spends on the step in all processes; None where
        that is what it would have cost itself."""
        if self.plain is None:
            return None
        return float(self.plain * world_size() * self.schedule.weights[index] / self.schedule.weights.sum())

    def weigh(self, items: np.ndarray, global_items: np.ndarray) -> None:
        """Weight micro-batches by their items here and in all processes, [N] each, see `MicroBatch.weight`."""
        totals = np.full(len(items), global_items[~self.schedule.skipped].sum())
        if self.each_is_a_step:
            totals = np.asarray(global_items, dtype=float)
        weights = items * world_size() / np.where(totals > 0, totals, 1.0)
        self.micro_batches = [
            dataclasses.replace(micro_batch, weight=float(weight))
            for micro_batch, weight in zip(self.micro_batches, weights, strict=True)
        ]

    def enter(self, account: Account) -> None:
        """Enter what the step cost into the run's account, once; every process calls it alike."""
        if self.prices is None:
            return
        plain, foreseen, executed, full = self._figures()
        if full:  # at the prices that the step was planned with, whatever lengths its batches turned out to have
            account.settle(plain, foreseen, foreseen * executed / full)
        self.prices = None

    def enter_or_leave_open(self, account: Account) -> tuple[float, ...] | None:
        """`enter`, if the step is over; else what `reopen` needs to go on with it."""
        if self.prices is None or self.complete:
            self.enter(account)
            return None
        return tuple(self._figures().tolist())

    def reopen(self, figures: Sequence[float]) -> None:
        """Go on with a step that a checkpoint interrupted."""
        plain, foreseen, self.executed, self.full = figures
        self.prices = Prices(plain, foreseen)

    def _figures(self) -> np.ndarray:
        return mean_over_processes(self.prices.plain, self.prices.foreseen, self.executed, self.full)

    def share_here(self, index: int) -> float:
        """How many times over what this process runs of a micro-batch stands for what all processes do."""
        return float(self.schedule.weights[index] / self.sizes[index])


@dataclasses.dataclass(frozen=True)
class Prices:
    """FLOPs of one step in the mean over the processes, where every subnet is FULL.

    Attributes:
        plain: Of the data loader's batches, as plain training runs them.
        foreseen: Of the micro-batches that run.
    """

    plain: float
    foreseen: float


def check_same_schedule(schedule: Schedule) -> None:
    """Compare the schedule of all processes: such as drift apart would wait for each other for ever, or train nonsense.

    Raises:
        ValueError: They differ; on every process.
    """
    if world_size() == 1:
        return
    digests = gather(np.array([float(int(schedule.digest()[:12], 16))]))[:, 0]
    if (digests != digests[0]).any():
        others = ", ".join(map(str, np.flatnonzero(digests != digests[0])))
        raise ValueError(
            f"the schedule of process {others} differs from that of process 0; give all processes the same D2FTConfig, "
            "seed and weights (transformers.set_seed before the model is made), and a policy that draws from "
            "problem.rng only."
        )
