"""From the batches of an optimizer step to what the Trainer comes to: scheduled, composed, as many as it counts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..planning import D2FTPlanner
from ..planning.candidates import Candidates
from ..planning.facts import BatchFacts, take_facts
from ..scores import INDEX_KEY
from .data import TrainingData
from .rollouts import Rollouts
from .window import Task, Window


class StepTasks:
    """Fetches and schedules the micro-batches of every optimizer step.

    Args:
        planner: Makes the schedules.
        data: Collates the samples that are composed.
        before_first: Called with a batch before every schedule: what has to be done before the first.
        accumulation: Micro-batches that the Trainer makes of a step.
        rollouts: Generates what is trained on, where the Trainer does so within its steps; else None.

    Attributes:
        window: Steps that are scheduled together where no gradients are accumulated.
    """

    def __init__(
        self,
        planner: D2FTPlanner,
        data: TrainingData,
        before_first: Callable[[dict[str, Any] | None], None],
        accumulation: int,
        rollouts: Rollouts | None = None,
    ):
        self.planner, self.data, self.accumulation, self.rollouts = planner, data, accumulation, rollouts
        self._before_first = before_first
        self.window = Window()
        self._rest: dict[str, Any] | None = None

    def next_step(self, iterator: Iterator, num_batches: int) -> tuple[list[Task], list[Task]]:
        """The next step's micro-batches.

        Args:
            iterator: The pass over the data.
            num_batches: How many the Trainer asks for.

        Returns:
            Those of the schedule, in its order; and as many as the Trainer counts, those that do not run first.
        """
        if self.accumulation == 1 and not self.planner.schedules_samples:
            tasks = self._next_of_window(iterator)
            return tasks, tasks
        candidates = list(itertools.islice(iterator, num_batches))
        if self.rollouts is not None:
            return self._next_generated(candidates)
        tasks = self._schedule(candidates) if candidates else []
        return tasks, self._as_many(candidates, [task for task in tasks if task.runs])

    def _next_generated(self, prompts: list) -> tuple[list[Task], list[Task]]:
        """The next step of a Trainer that generates what it trains on; see `next_step`."""
        rollouts, planner = self.rollouts, self.planner
        if not prompts:
            return [], []
        batches = rollouts.generate(prompts)
        planner.counts.each_is_a_step = False
        if not planner.costs.known:
            planner.prepare(rollouts.model_inputs(batches[0]))
        if planner.schedules_samples:
            composed = rollouts.compose(batches)
            self._check_parts(len(composed), len(batches))
            facts = [rollouts.facts(batch) for batch in composed]
            planner.weigh(facts)
            tasks = [Task(i, *one) for i, one in enumerate(zip(composed, facts, strict=True))]
        else:
            tasks = self._whole(batches, [rollouts.facts(batch) for batch in batches])
            rollouts.note(batches, {task.index for task in tasks if task.runs})
        running = [task for task in tasks if task.runs]
        rollouts.count(len(batches), len(running))
        return tasks, self._as_many(batches, running)

    def state(self) -> dict[str, Any] | None:
        """What is left of a window, JSON-friendly, or None."""
        tasks = list(self.window.tasks)
        if not tasks:
            return None
        nothing = [0] * self.planner.partition.num_scheduled
        rows = [list(self.planner.peek(t.index).plan.operations) if t.runs else nothing for t in tasks]
        return {"operations": rows, "devices": self.planner.schedule.devices.tolist()}

    def resume(self, rest: dict[str, Any] | None) -> None:
        """Go on with what `state` said was left of a window."""
        self.window, self._rest = Window(), rest

    @staticmethod
    def _as_many(candidates: list[dict], running: list[Task]) -> list[Task]:
        """Tasks for as many micro-batches as the Trainer counts: fewer begin with some that do not run (they were
        counted when they were scheduled), more are run several at a time."""
        if len(running) > len(candidates):
            parts = np.array_split(np.arange(len(running)), len(candidates))
            groups = [[running[i] for i in part] for part in parts]
            return [dataclasses.replace(last, before=tuple(before)) for *before, last in groups]
        stand_in = running[0].batch if running else candidates and candidates[0]
        passed = Task(None, stand_in, BatchFacts(0), runs=False)
        return [*[passed] * (len(candidates) - len(running)), *running]

    def _schedule(self, candidates: list[dict]) -> list[Task]:
        """Schedule batches. Where samples are scheduled, micro-batches are composed of them."""
        planner = self.planner
        if planner.schedules_samples and not self.data.gives_candidates(candidates):
            planner.rows = "micro_batches"
        planner.counts.each_is_a_step = self.accumulation == 1 and not planner.schedules_samples
        if planner.schedules_samples:
            return self._compose(candidates)
        facts = [take_facts(batch, planner.shifts_labels) for batch in candidates]
        planner.prepare(candidates[0])
        self._before_first(candidates[0])
        return self._whole(candidates, facts)

    def _whole(self, candidates: list[dict], facts: list[BatchFacts]) -> list[Task]:
        self.planner.plan_facts(facts)
        running = set(self.planner.pass_over())
        return [Task(i, candidates[i], facts[i], i in running) for i in range(len(candidates))]

    def _compose(self, batches: list[dict]) -> list[Task]:
        planner = self.planner
        indices, items = self.data.given(batches)
        size, batch = max(len(batch[INDEX_KEY]) for batch in batches), None
        if not planner.prepared:
            batch = self.data.collate(indices[: len(batches[0][INDEX_KEY])], items)[0]
            planner.prepare(batch)
        self._before_first(batch)
        candidates = Candidates.of_loader(indices, size, self.data.lengths(indices, items))
        if planner.shares is None:
            candidates = candidates.dealt()
        groups = [candidates.indices[group] for group in planner.compose(candidates, candidates.size)]
        self._check_parts(len(groups), len(batches))
        collated = [self.data.collate(group, items) for group in groups]
        if planner.shares is None and collated:
            planner.weigh([facts for _, facts in collated])
        return [Task(i, batch, facts) for i, (batch, facts) in enumerate(collated)]

    def _check_parts(self, composed: int, batches: int) -> None:
        schedule = self.planner.schedule
        if schedule.num_micro_batches > batches and schedule.runs_in_part:
            raise ValueError(
                f"policy={self.planner.config.policy!r} with rows='samples' composed {composed} micro-batches of "
                f"{batches}; set rows='micro_batches', or choose a policy that runs samples as a whole."
            )

    def _next_of_window(self, iterator: Iterator) -> list[Task]:
        """The next step of the window; an empty one is filled, by a resumed run with the rest of the one it was in."""
        if not self.window.belongs_to(iterator):
            rest, self._rest = self._rest, None
            size = self.planner.config.num_micro_batches if rest is None else len(rest["operations"])
            candidates = list(itertools.islice(iterator, size))
            if not candidates:
                return []
            tasks = self._schedule(candidates) if rest is None else self._resume_window(rest, candidates)
            self.window.fill(iterator, tasks)
        return [self.window.tasks.popleft()]

    def _resume_window(self, rest: dict[str, Any], candidates: list[dict]) -> list[Task]:
        """Finish the window that a checkpoint was made in, on the same samples in the same order."""
        planner, rows = self.planner, np.array(rest["operations"], dtype=np.int8)
        planner.counts.each_is_a_step = True
        facts = [take_facts(batch, planner.shifts_labels) for batch in candidates]
        devices = None if rest["devices"] is None else np.array(rest["devices"])
        planner.resume(rows[: len(facts)], facts, devices)
        if candidates:
            planner.prepare(candidates[0])
        running = set(planner.pass_over())
        return [Task(i, candidates[i], facts[i], i in running) for i in range(len(facts))]
