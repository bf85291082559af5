"""Where a planner's scores of samples come from: weights, a pass before training, or training itself."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from ..partition import Partition, base_model
from ..processes import gather_samples, world_size
from ..tuners.config import LIVE_SCORES
from .contribution import GRADIENT_SCORES, weight_magnitude
from .live import LiveScores, live_score
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
    """

    def __init__(self, model: nn.Module, partition: Partition, names: tuple[str, ...], interval: int):
        self.model, self.partition, self.names, self.interval = model, partition, names, interval
        self.tables: dict[str, ScoreTable] = {}
        self.live = {name: LiveScores(name) for name in names if name in LIVE_SCORES}
        self._magnitude: tuple[int, np.ndarray] | None = None
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
            if self._magnitude is None or self._magnitude[0] != era:
                self._magnitude = era, self._weight_magnitude()
            return self._magnitude[1]
        table = self.tables.get(name)
        if indices is None or (name in GRADIENT_SCORES and table is None):
            missing = f"the batches do not carry {INDEX_KEY!r}" if indices is None else "no sample was scored"
            raise ValueError(
                f"score {name!r} depends on the samples, but {missing}; train with D2FTTrainer, give D2FTCallback to "
                "the Trainer's constructor, or choose policy='bilevel' with backward_score='weight_magnitude'."
            )
        if name in GRADIENT_SCORES:
            return table.lookup(indices)
        return np.tile(self.live[name].lookup(indices)[:, None], (1, self.partition.num_scheduled))

    def _weight_magnitude(self) -> np.ndarray:
        return weight_magnitude(self.model, self.partition)

    def observe(self, logits: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
        """Live scores [n] of the samples of a forward pass, by name; `update` takes them over."""
        base = base_model(self.model)
        return {name: live_score(name, base, logits, labels) for name in self.live}

    def update(self, indices: np.ndarray, values: dict[str, np.ndarray], step: int = 0) -> None:
        """Take over what `observe` returned in a step; the other processes learn of it by `share`."""
        if self.live and world_size() > 1:
            self._untold.append((indices, step, values))
        self._take_over(indices, values)

    def share(self) -> None:
        """Tell the processes what each has seen since the last time; every process calls it alike."""
        if not self.live or world_size() == 1:
            return
        visits, self._untold = self._untold, []
        indices = np.concatenate([np.empty(0, dtype=np.int64), *(visit[0] for visit in visits)])
        steps = np.concatenate([np.empty(0), *(np.full(len(visit[0]), visit[1]) for visit in visits)])
        values = {name: np.concatenate([np.empty(0), *(visit[2][name] for visit in visits)]) for name in self.live}
        indices, values = gather_samples(indices, {"step": steps, **values})
        # Of several visits to a sample the last one counts, in all processes alike.
        order = np.argsort(values.pop("step"), kind="stable")
        self._take_over(indices[order], {name: value[order] for name, value in values.items()})

    def _take_over(self, indices: np.ndarray, values: dict[str, np.ndarray]) -> None:
        for name, scores in self.live.items():
            scores.update(indices, values[name])
