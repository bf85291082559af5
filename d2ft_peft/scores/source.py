"""Where a planner's scores of samples come from: weights, a pass before training, or training itself."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from ..partition import Partition
from ..processes import world_size
from ..tuners.config import LIVE_SCORES
from .contribution import GRADIENT_SCORES, weight_magnitude
from .gather import gather_samples
from .live import HostCopy, LiveScores
from .outputs import score_outputs
from .score_table import INDEX_KEY, ScoreTable


class ScoreSource:
    """The scores that a policy reads, by sample.

    Args:
        model: The D2FT model.
        partition: Its subnets.
        names: Names of the scores that are read.
        interval: Steps for which the magnitude of the weights, which moves slowly, is kept.

    Attributes:
        tables: Scores of a pass before training, by name.
        live: Scores that follow training, by name.
        magnitude: Magnitude of the weights, [K], and the interval that it was taken in.
    """

    def __init__(self, model: nn.Module, partition: Partition, names: tuple[str, ...], interval: int):
        self.model, self.partition, self.names, self.interval = model, partition, names, interval
        self.tables: dict[str, ScoreTable] = {}
        self.live = {name: LiveScores(name) for name in names if name in LIVE_SCORES}
        self.magnitude: tuple[int, np.ndarray] | None = None
        self._untold: list[tuple[np.ndarray, int, dict[str, np.ndarray]]] = []

    @property
    def before_training(self) -> tuple[str, ...]:
        """Scores that need a pass over the training samples."""
        return tuple(name for name in self.names if name in GRADIENT_SCORES)

    @property
    def by_sample(self) -> bool:
        """Whether a score depends on the sample."""
        return bool(self.live or self.before_training)

    def of(self, name: str, indices: np.ndarray | None, step: int) -> np.ndarray:
        """Scores float [n, K] of samples; of a score that does not depend on them [K].

        Args:
            name: Name of the score.
            indices: Indices [n] of the samples in the data set, or None if they are not known.
            step: Number of the step.

        Raises:
            ValueError: If the score depends on the sample and nothing is known of it.
        """
        if name == "weight_magnitude":
            era = step // self.interval
            if self.magnitude is None or self.magnitude[0] != era:
                self.magnitude = era, self._weight_magnitude()
            return self.magnitude[1]
        table = self.tables.get(name)
        if indices is None or (name in GRADIENT_SCORES and table is None):
            missing = f"the batches do not carry {INDEX_KEY!r}" if indices is None else "no sample was scored"
            raise ValueError(
                f"score {name!r} depends on the samples, but {missing}; train with D2FTTrainer, give D2FTCallback to "
                "the Trainer's constructor, or choose policy='bilevel' with backward_score='weight_magnitude'."
            )
        if table is not None:
            return table.lookup(indices)
        values = self.live[name].lookup(np.asarray(indices))
        return np.broadcast_to(values[:, None], (len(values), self.partition.num_scheduled))

    def _weight_magnitude(self) -> np.ndarray:
        return weight_magnitude(self.model, self.partition)

    def observe(
        self,
        indices: np.ndarray,
        logits: Tensor,
        labels: Tensor | None,
        step: int = 0,
        position_ids: Tensor | None = None,
        shift_labels: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
    ) -> None:
        """Let the live scores see a forward pass of this process, without waiting for the device.

        The scores are taken over when they are asked for; the other processes learn of them by `share`.

        Args:
            indices: Indices of the samples in the data set, int [n].
            logits: Outputs [n, ..., classes].
            labels, position_ids, shift_labels, cu_seq_lens: As `score_outputs` reads them.
            step: Number of the step.

        Raises:
            ValueError: If the outputs do not give one score for each sample.
        """
        if not self.live:
            return
        indices = np.asarray(indices)
        copies = {
            name: HostCopy(
                score_outputs(
                    name, self.model, logits, labels, len(indices), position_ids, shift_labels, cu_seq_lens
                )
            )
            for name in self.live
        }  # fmt: skip
        for name, copy in copies.items():
            self.live[name].expect(indices, copy)
        self._note(indices, step, copies)

    def update(self, indices: np.ndarray, values: dict[str, np.ndarray], step: int = 0) -> None:
        """Take over live scores [n] of samples that this process saw in a step, by name."""
        self._note(indices, step, values)
        self._take_over(indices, values)

    def _note(self, indices: np.ndarray, step: int, values: dict[str, np.ndarray] | dict[str, HostCopy]) -> None:
        if self.live and world_size() > 1:
            self._untold.append((indices, step, values))

    def share(self) -> None:
        """Tell the processes what each has seen since the last time; every process calls it alike."""
        if not self.live or world_size() == 1:
            return
        visits, self._untold = self._untold, []
        indices = np.concatenate([np.empty(0, dtype=np.int64), *(visit[0] for visit in visits)])
        steps = np.concatenate([np.empty(0), *(np.full(len(visit[0]), visit[1]) for visit in visits)])
        values = {
            name: np.concatenate([np.empty(0), *(_arrived(visit[2][name]) for visit in visits)]) for name in self.live
        }
        indices, values = gather_samples(indices, {"step": steps, **values})
        # Of several visits to a sample the last one counts, in all processes alike.
        order = np.argsort(values.pop("step"), kind="stable")
        self._take_over(indices[order], {name: value[order] for name, value in values.items()})

    def _take_over(self, indices: np.ndarray, values: dict[str, np.ndarray]) -> None:
        for name, scores in self.live.items():
            scores.update(indices, values[name])


def _arrived(values: np.ndarray | HostCopy) -> np.ndarray:
    return values.numpy() if isinstance(values, HostCopy) else values
