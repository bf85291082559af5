"""Runs the micro-batches of a schedule, and counts what ran."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ..engine.plan import executed_operations
from ..partition import base_model
from ..processes import MEETING, is_sharded, world_size
from ..schedule import Schedule
from ..unequal import Shares
from ..value_checks import check_integer, is_integer
from .execution_counts import ExecutionCounts
from .micro_batch import MicroBatch
from .model_costs import Pass, Unread, separated
from .planned_step import PlannedStep
from .schedule_maker import ScheduleMaker
from .token_budget import TokenBudget


class PlanRunner(ScheduleMaker):
    """The execution half of a planner: from the schedule of a step to what was executed of it.

    Args:
        model: A model wrapped with a `D2FTConfig`; its active adapter's configuration holds.
        num_micro_batches: Micro-batches of a usual step; by default those of the first.
        steps: Optimizer steps of the whole run, which policies over tokens ask for.

    Attributes:
        counts: What was executed.
        tokens: How many tokens pass the middle blocks, or None unless the policy is over tokens.
        shares: How samples are shared out over unequal processes, or None if all run equally many.
    """

    def __init__(self, model: nn.Module, num_micro_batches: int | None = None, steps: int | None = None):
        super().__init__(model, num_micro_batches)
        if steps is not None:
            check_integer("steps", steps, 1, ", or None")
        self.steps = steps
        self.tokens: TokenBudget | None = None
        if self.config.rows == "tokens":
            self.tokens = TokenBudget(self.config, self.costs, len(self.partition.blocks))
            self.costs.middle = self.tokens.blocks
        self.counts = ExecutionCounts()
        base = base_model(model)
        self._owned = [base.get_submodule(name) for name in self.partition.owned]
        self.shares: Shares | None = None
        if self.config.is_auto:
            self.shares = Shares(self.config.budget, next(self._owned[0].parameters()).device)
        self.runtime.after_backward = self.shares.pace.ready if self.shares else None
        self.runtime.touch_gradients = world_size() > 1 and not (self.is_head_parallel or is_sharded(model))
        self._planned: PlannedStep | None = None
        self._last_flops = 0.0

    @property
    def schedule(self) -> Schedule | None:
        """The schedule of the current step, or None before the first."""
        return self._planned and self._planned.schedule

    @property
    def num_planned(self) -> int:
        """Rows of the current step's schedule; 0 before the first."""
        return 0 if self._planned is None else self.schedule.num_micro_batches

    @property
    def _step(self) -> PlannedStep:
        """The planned step. Raises ValueError before the first."""
        if self._planned is None:
            raise ValueError("no micro-batch is planned; call plan(batches) or compose(indices, size) first.")
        return self._planned

    def use(self, schedule: Schedule, sizes: np.ndarray | None = None) -> None:
        """Take a schedule made elsewhere as the current step's.

        Args:
            schedule: Its weights are the sizes of the micro-batches over all processes.
            sizes: Sizes in this process, [N]; the schedule's weights by default.
        """
        sizes = np.asarray(schedule.weights if sizes is None else sizes)
        self.counts.close(self.schedule)  # a former step may have been left unfinished
        self.counts.begin()
        self._planned = PlannedStep(self.partition, schedule, sizes, self.counts.each_is_a_step)

    def pass_over(self) -> list[int]:
        """Note that the micro-batches which are skipped as a whole do not run; returns the indices of the others."""
        running = []
        for index, micro_batch in enumerate(self._planned.micro_batches if self._planned else ()):
            if not micro_batch.skipped:
                running.append(index)
            elif not self.counts.each_is_a_step:
                self.pass_by(index)
        return running

    def pass_by(self, index: int) -> None:
        """Note that a micro-batch does not run."""
        self._note(index, np.array(self._planned.micro_batches[index].plan.operations), [])

    @contextmanager
    def micro_batch(self, index: int) -> Iterator[MicroBatch]:
        """Run forward and backward of one micro-batch under its row of the schedule."""
        micro_batch = self.peek(index)
        tokens = self.tokens and self.tokens.next_micro_batch()
        with self.costs.learning(), self.runtime.use(micro_batch.plan, tokens):
            yield micro_batch
            row = executed_operations(self.partition, self.runtime.executed)
            passes = separated(self.runtime.passes, self._planned.facts[index], self.model)
            unread = [reading and reading.ran for reading in self.runtime.readings]
            spared = self.costs.spared(row, self.runtime.cache)
        if self.tokens is not None:
            self.tokens.check_ran(passes)
        if self.counts.each_is_a_step and not micro_batch.skipped:
            self._zero_missing_gradients()
        self._note(index, row, passes, unread, spared)

    def _note(
        self,
        index: int,
        row: np.ndarray,
        passes: list[Pass],
        unread: Sequence[Unread | None] = (),
        spared: float = 0.0,
    ) -> None:
        planned, costs = self._planned, self.costs
        here, length = planned.sizes[index], planned.length(index)
        if passes:
            costs.saw(passes, here)
        self._last_flops = costs.flops(row, passes, unread) - spared
        planned.executed += self._last_flops
        planned.full += costs.full_flops(passes)

        def measure() -> tuple[float, float]:
            plain = planned.plain_flops(index)
            if not here:  # samples of other processes, which are not looked at here
                here_full = costs.full_flops(costs.expected(planned.schedule.weights[index], length))
                return 0.0, here_full if plain is None else plain
            flops, share = costs.flops(row, passes, unread) - spared, planned.share_here(index)
            full = share * costs.full_flops(passes or costs.expected(here, length)) if plain is None else plain
            return share * flops, full

        self.counts.note(index, row, measure, planned.facts[index] if passes else None, costs.shares(passes))
        if self.counts.is_complete(self.schedule):
            self._finish_step()

    def peek(self, index: int) -> MicroBatch:
        """The micro-batch, without running it."""
        micro_batches = self._step.micro_batches
        if not is_integer(index) or not 0 <= index < len(micro_batches):
            raise ValueError(f"index={index!r} is none of the {len(micro_batches)} micro-batches that are planned.")
        return micro_batches[index]

    def _zero_missing_gradients(self) -> None:
        """A projection that was FULL nowhere in a step has a gradient of zero, like the heads that were not FULL in one
        that was: an optimizer with momentum then treats them alike, on one process as on several."""
        if getattr(self.model, MEETING, False):
            return  # DeepSpeed has made the step, in which what has no gradient counts as zero
        # Looked up when they are needed: FSDP exchanges the parameters of a model that is wrapped.
        for parameter in (parameter for module in self._owned for parameter in module.parameters()):
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def _finish_step(self) -> None:
        if self.shares is not None:
            self.shares.end_step()
        if not self.counts.each_is_a_step and not self.schedule.skipped.all():
            self._zero_missing_gradients()
        self.counts.finish(self.schedule)
        self._planned.complete = True

    def pop_logs(self) -> dict[str, float]:
        """Means over the steps since the last call, as executed (`Totals.logs`), and `Shares.logs`."""
        return self.counts.pop(self.schedule) | (self.shares.logs() if self.shares else {})

    def last_flops(self) -> float:
        """FLOPs of the last micro-batch in this process, as executed."""
        return self._last_flops
