"""The micro-batches that are scheduled together, on their way to the Trainer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..planning.facts import BatchFacts


@dataclass(frozen=True)
class Task:
    """One micro-batch that the Trainer comes to.

    Attributes:
        index: Its number in the planner's schedule, or None if another one of the schedule counts for it as well.
        batch: Its inputs; of one that does not run, whatever the Trainer may look at.
        facts: What planning knows of it.
        runs: Whether it runs at all.
    """

    index: int | None
    batch: dict[str, Any]
    facts: BatchFacts
    runs: bool = True


@dataclass
class Window:
    """Successive optimizer steps that are scheduled together where the Trainer accumulates no gradients.

    It belongs to one pass over the data: where another one begins, because an epoch was stopped, what is left is
    dropped.

    Attributes:
        iterator: The pass over the data.
        tasks: What is left of the window.
    """

    iterator: Iterator | None = None
    tasks: deque[Task] = field(default_factory=deque)

    def belongs_to(self, iterator: Iterator) -> bool:
        """Whether there is something left for this pass over the data."""
        return self.iterator is iterator and bool(self.tasks)

    def fill(self, iterator: Iterator, tasks: list[Task]) -> None:
        """Take over the tasks of the next steps."""
        self.iterator, self.tasks = iterator, deque(tasks)
