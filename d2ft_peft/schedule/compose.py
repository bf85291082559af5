"""From a schedule of samples to micro-batches: samples that get the same operations run together."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .schedule import Schedule


@dataclass(frozen=True, eq=False)
class Composition:
    """Micro-batches composed of samples.

    Attributes:
        micro_batches: Positions of the samples of each micro-batch that runs, ascending; int arrays.
        schedule: Its first rows are these micro-batches; a last one holds the samples that do not run, if there are
            any. Weights are numbers of samples.
    """

    micro_batches: tuple[np.ndarray, ...]
    schedule: Schedule

    def regrouped(self, count: int) -> "Composition":
        """The same samples in another number of micro-batches, where processes have to run equally many.

        Args:
            count: Number of micro-batches, at most the samples that run. For more of them the largest are halved, for
                fewer the smallest neighbours, which are about as long, run together.
        """
        here, ran = self.schedule, len(self.micro_batches)
        parts = list(zip(self.micro_batches, range(ran), here.weights, strict=False))
        while len(parts) < count:
            largest = max(range(len(parts)), key=lambda i: len(parts[i][0]))
            part, row, weight = parts[largest]
            halves = np.array_split(part, 2)
            parts[largest : largest + 1] = [(half, row, weight * len(half) / len(part)) for half in halves]
        while len(parts) > count:
            smallest = min(range(len(parts) - 1), key=lambda i: len(parts[i][0]) + len(parts[i + 1][0]))
            (part, row, weight), (other, _, others) = parts[smallest : smallest + 2]
            parts[smallest : smallest + 2] = [(np.sort(np.concatenate([part, other])), row, weight + others)]
        micro_batches, rows, weights = zip(*parts, strict=True) if parts else ((), (), ())
        operations = here.operations[[*rows, *range(ran, len(here.weights))]]
        weights = np.array([*weights, *here.weights[ran:]])
        return Composition(micro_batches, replace(here, operations=operations, weights=weights, capacities=None))

    def among_processes(self, ran: int, candidates: int) -> tuple[Schedule, np.ndarray]:
        """The step as all processes make it, of which this composition is one's part.

        Where whole samples run, their number is all that has to be known of the other processes.

        Args:
            ran: Number of samples that run in all processes.
            candidates: Number of candidates of all processes.

        Returns:
            A schedule whose weights stand for the samples of all processes: those that run are spread over the
            micro-batches as they are here. And the sizes of its micro-batches here, [N].

        Raises:
            ValueError: There are other processes, and a sample runs in part.
        """
        here = self.schedule
        sizes, running = here.weights, ~here.skipped
        if candidates > sizes.sum() and here.runs_in_part:
            raise ValueError(
                "a policy over samples ran some of them in part; in several processes they run as a whole: choose "
                "policy='fewer_samples', 'importance' or 'selective_backprop', or set rows='micro_batches'"
            )
        weights = sizes * (ran / sizes[running].sum())
        operations = here.operations
        if candidates > ran:
            if running.all():  # here, not elsewhere
                operations = np.concatenate([operations, np.zeros_like(operations[:1])])
                weights, sizes = np.append(weights, 0.0), np.append(sizes, 0.0)
            weights[-1] = candidates - ran
        return replace(here, operations=operations, weights=weights, capacities=None), sizes


def compose(samples: Schedule, size: int, cut: Callable[[np.ndarray], list[np.ndarray]] | None = None) -> Composition:
    """Groups samples by their operations, and cuts the groups into micro-batches.

    Args:
        samples: A schedule whose rows are samples.
        size: Most samples of a micro-batch, which bounds the memory of a step.
        cut: Cuts positions of samples [n] into micro-batches, instead of into ones of nearly equal size.

    Raises:
        ValueError: size is not positive.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1; give the samples that fit into a micro-batch")
    alike: dict[bytes, list[int]] = {}
    for position, row in enumerate(samples.operations):
        alike.setdefault(row.tobytes(), []).append(position)
    micro_batches, operations = [], []
    # Largest first: if micro-batches differ in what they do, the costliest comes first.
    for content in sorted(alike, reverse=True):
        row, members = np.frombuffer(content, dtype=np.int8), np.array(alike[content])
        if row.any():
            parts = np.array_split(members, -(-len(members) // size)) if cut is None else cut(members)
            micro_batches.extend(parts)
            operations.extend([row] * len(parts))
    weights = [float(samples.weights[part].sum()) for part in micro_batches]
    if samples.skipped.any():
        operations.append(np.zeros_like(samples.operations[0]))
        weights.append(float(samples.weights[samples.skipped].sum()))
    schedule = Schedule(
        np.stack(operations), np.array(weights), samples.devices, samples.costs, samples.capacities, samples.blocks
    )
    return Composition(tuple(micro_batches), schedule)
