"""Scores of samples that follow training: what the last visit of a sample showed, at no extra pass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .outputs import refuse_miscounted


_MOST_PENDING = 256


class HostCopy:
    """Numbers on their way from a device; nobody waits for them before they are read.

    Args:
        values: A tensor, which is not written to afterwards.
    """

    def __init__(self, values: Tensor):
        self._values, self._arrived = values.detach(), None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def numpy(self) -> np.ndarray:
        """The numbers, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._values.cpu().numpy()


class LiveScores:
    """The last-seen score of every sample.

    An infinite score says that the sample is as hard as any: it counts like the largest finite score of all samples.
    NaN says nothing: the sample counts like one that was not visited.

    Args:
        score: Name of the score.
    """

    def __init__(self, score: str):
        self.score = score
        self._values = np.empty(0, dtype=np.float32)
        self._pending: list[tuple[np.ndarray, HostCopy]] = []

    @property
    def values(self) -> np.ndarray:
        """float32 [samples known so far]; NaN where nothing is known of a sample, infinity as it was seen."""
        pending, self._pending = self._pending, []
        for indices, copy in pending:
            arrived = copy.numpy()
            refuse_miscounted(self.score, arrived)
            self._take_over(indices, arrived)
        return self._values

    def expect(self, indices: np.ndarray, copy: HostCopy) -> None:
        """Take over scores [n] of samples [n] that were just visited, once they are asked for."""
        self._pending.append((indices, copy))
        if len(self._pending) > _MOST_PENDING:
            _ = self.values

    def update(self, indices: np.ndarray, values: np.ndarray) -> None:
        """Take over the scores [n] of samples [n] that were just visited."""
        _ = self.values  # what is under way was seen before
        self._take_over(indices, values)

    def _take_over(self, indices: np.ndarray, values: np.ndarray) -> None:
        if not len(indices):
            return
        if indices.max() >= len(self._values):
            grown = np.full(max(indices.max() + 1, 2 * len(self._values)), np.nan, dtype=np.float32)
            grown[: len(self._values)] = self._values
            self._values = grown
        with np.errstate(over="ignore"):
            self._values[indices] = values

    def lookup(self, indices: np.ndarray) -> np.ndarray:
        """Scores of samples, float32 [n], finite; one of which nothing is known gets the mean of the others, or 1."""
        table = self.values
        values = np.full(len(indices), np.nan, dtype=np.float32)
        known = indices < len(table)
        values[known] = table[indices[known]]
        values[values == -np.inf] = np.nan
        endless = np.isposinf(values)
        if endless.any():
            finite = table[np.isfinite(table)]
            values[endless] = finite.max() if len(finite) else np.nan
        unknown = np.isnan(values)
        values[unknown] = 1.0 if unknown.all() else values[~unknown].mean(dtype=np.float64)
        return values

    def restore(self, values: np.ndarray) -> None:
        """Go on with the `values` of a checkpoint."""
        self._pending, self._values = [], np.array(values)
