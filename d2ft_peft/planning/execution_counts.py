"""What was executed, added up between two logs: numbers, not schedules, however far apart the logs are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np

from ..schedule import Schedule
from .facts import BatchFacts


@dataclass
class Totals:
    """Sums over optimizer steps.

    Attributes:
        steps: Optimizer steps.
        weight: Samples that were planned.
        compute, communication, variance: Sums of their ratios and of their workload variance, each times its samples.
        flops, full_flops: FLOPs as executed, and those of plain training: every subnet of every micro-batch FULL, and
            where micro-batches were composed by length, padded as the data loader's own batches.
        tokens, padded: Tokens that ran, without padding and with it, where masks tell.
    """

    steps: int = 0
    weight: float = 0.0
    compute: float = 0.0
    communication: float = 0.0
    variance: float = 0.0
    flops: float = 0.0
    full_flops: float = 0.0
    tokens: float = 0.0
    padded: float = 0.0

    def add(self, other: Totals) -> None:
        """Add other sums."""
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def logs(self) -> dict[str, float]:
        """Means: ratios of the subnets, ``flops_ratio`` with embeddings and head, ``step_flops``, and where masks tell
        ``padding_ratio``, the share of padding among the tokens that ran. Where nothing was planned since, nothing
        ran."""
        weight, full_flops = self.weight or 1.0, self.full_flops or 1.0
        padding = {"padding_ratio": 1 - self.tokens / self.padded} if self.padded else {}
        return padding | {
            "compute_ratio": self.compute / weight,
            "communication_ratio": self.communication / weight,
            "workload_variance": self.variance / weight,
            "flops_ratio": self.flops / full_flops,
            "step_flops": self.flops / max(self.steps, 1),
        }


@dataclass
class ExecutionCounts:
    """Counts the rows of schedules as they were executed.

    Attributes:
        each_is_a_step: Whether an optimizer step follows every micro-batch, instead of the last of a planned step.
        last: The last planned step as it was executed, or None before the first.
        since_log: Sums since the last `pop`.
        of_run: Sums since the start of the run.
    """

    each_is_a_step: bool = False
    last: Schedule | None = None
    since_log: Totals = field(default_factory=Totals)
    of_run: Totals = field(default_factory=Totals)
    _open: dict[int, tuple[np.ndarray, Callable[[], tuple[float, float]], tuple[float, float]]] = field(
        default_factory=dict
    )
    _rows: dict[int, np.ndarray] = field(default_factory=dict)

    def begin(self) -> None:
        """A step was planned: what ran of an earlier one that was left unfinished stays counted."""
        self._rows = {}

    def note(
        self,
        index: int,
        row: np.ndarray,
        measure: Callable[[], tuple[float, float]],
        facts: BatchFacts | None = None,
        shares: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """A micro-batch of the planned step ran, or was passed over.

        Args:
            index: Its number in the schedule: a loop may run them in another order.
            row: Operation of each subnet as executed, int [K].
            measure: Gives its FLOPs, and those if it had been FULL everywhere; asked once the step is over, when those
                that ran have shown what one that did not would have cost.
            facts: What is known of its content, if it ran.
            shares: What it did of the row's compute and communication, where tokens were left out.
        """
        self.see(facts)
        self._rows[index] = row
        self._open[index] = row, measure, shares

    def see(self, facts: BatchFacts | None) -> None:
        """Count the tokens of a micro-batch that ran, as far as they are known."""
        if facts is not None and facts.tokens is not None and facts.length is not None:
            rows = facts.size if facts.lengths is None else 1
            seen = Totals(tokens=facts.tokens, padded=rows * facts.length)
            self.since_log.add(seen)
            self.of_run.add(seen)

    def is_complete(self, schedule: Schedule) -> bool:
        """Whether every micro-batch of the planned step was noted."""
        return len(self._rows) == schedule.num_micro_batches

    def finish(self, schedule: Schedule) -> None:
        """The planned step is complete."""
        rows = np.stack([self._rows[index] for index in range(schedule.num_micro_batches)])
        self.last = _as_executed(schedule, range(len(rows)), rows)
        self.close(schedule)
        self._rows = {}
        if not self.each_is_a_step:
            self.end_step()

    def end_step(self) -> None:
        """An optimizer step is over."""
        self.since_log.steps += 1
        self.of_run.steps += 1

    def add(self, schedule: Schedule, flops: float, full_flops: float) -> None:
        """A whole step ran as this schedule."""
        self.last = schedule
        self._add(schedule, flops, full_flops)
        self.end_step()

    def pop(self, schedule: Schedule | None) -> dict[str, float]:
        """Means since the last call, what ran of a step that is not complete yet included."""
        self.close(schedule)
        totals, self.since_log = self.since_log, Totals()
        return totals.logs()

    def state(self) -> dict:
        """What a checkpoint holds; JSON-friendly."""
        return {"since_log": asdict(self.since_log), "of_run": asdict(self.of_run)}

    def load_state(self, state: dict) -> None:
        """Go on with a checkpoint's sums."""
        self.since_log, self.of_run = Totals(**state["since_log"]), Totals(**state["of_run"])

    def close(self, schedule: Schedule | None) -> None:
        """Add up what ran so far of the planned step."""
        indices = sorted(self._open)
        if not indices:
            return
        rows = np.stack([self._open[index][0] for index in indices])
        flops, full_flops = np.sum([self._open[index][1]() for index in indices], axis=0).tolist()
        part = _as_executed(schedule, indices, rows)
        shares = np.array([self._open[index][2] for index in indices])
        self._open = {}
        if (shares == 1).all():  # not left to rounding
            self._add(part, flops, full_flops)
        else:
            self._add(part, flops, full_flops, *np.average(shares, axis=0, weights=part.weights).tolist())

    def _add(
        self, part: Schedule, flops: float, full_flops: float, of_compute: float = 1.0, of_communication: float = 1.0
    ) -> None:
        ratios, weight = (
            (of_compute * part.compute_ratio, of_communication * part.communication_ratio, part.workload_variance),
            float(part.weights.sum()),
        )
        totals = Totals(0, weight, *(weight * ratio for ratio in ratios), flops, full_flops)
        self.since_log.add(totals)
        self.of_run.add(totals)


def _as_executed(schedule: Schedule, indices, rows: np.ndarray) -> Schedule:
    # What ran may exceed no capacity that planning kept: capacities are left out, they bind plans.
    return Schedule(rows, schedule.weights[list(indices)], schedule.devices, schedule.costs, None, schedule.blocks)
