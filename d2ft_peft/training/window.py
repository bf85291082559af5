"""The micro-batches that are scheduled together, on their way to the Trainer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..planning.facts import BatchFacts


if TYPE_CHECKING:
    from .session import TrainingSession


@dataclass(frozen=True, eq=False)
class Task:
    """One micro-batch that the Trainer comes to.

    Attributes:
        index: Its number in the planner's schedule, or None if another one of the schedule counts for it as well.
        batch: Its inputs; of one that does not run, whatever the Trainer may look at.
        facts: What planning knows of it.
        runs: Whether it runs at all.
        before: Others that run when the Trainer comes to this one, of which there are more than it counts.
    """

    index: int | None
    batch: dict[str, Any]
    facts: BatchFacts
    runs: bool = True
    before: tuple[Task, ...] = ()


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


class StepBatches(list):
    """The batches of an optimizer step, which know what they are when the Trainer comes to them.

    A Trainer of one's own may leave batches out, or run one twice: what a batch is does not depend on how many came
    before it.

    Args:
        session: Is told what the Trainer comes to.
        tasks: What the batches are.
    """

    def __init__(self, session: TrainingSession, tasks: Sequence[Task]):
        super().__init__(dict(task.batch) for task in tasks)
        self._session, self._tasks = session, tasks
        self._positions = {id(batch): position for position, batch in enumerate(super().__iter__())}

    def __iter__(self) -> Iterator[dict]:
        for position, batch in enumerate(super().__iter__()):
            self._arrive(position)
            yield batch

    def come_to(self, batch: dict) -> None:
        """A batch is about to run.

        Raises:
            ValueError: If it is none of these, and the Trainer did not come to one of these last.
        """
        position = self._positions.get(id(batch))
        if position is not None:
            self._arrive(position)
        elif self._session.current not in self._tasks:
            raise ValueError(
                "training_step got a batch that get_batch_samples did not give out, and D2FT knows no schedule for it; "
                "override neither in a way that exchanges batches, or change them in the collator."
            )

    def _arrive(self, position: int) -> None:
        self._session.arrive(self._tasks[position], position == len(self._tasks) - 1)
