"""Scores of a data set's samples: computed once, saved, looked up by the samples' indices."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..partition import Partition
from .contribution import gradient_scores


INDEX_KEY = "d2ft_index"
"""Key under which a batch carries the indices of its samples in the data set."""


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores [n, K] of n samples with their indices [n] in the data set.

    Attributes:
        score: Name of the score.
        samples: Indices of the scored samples, int64 [n], ascending.
        values: Their scores, float32 [n, K].
    """

    score: str
    samples: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.samples.shape != self.values.shape[:1]:
            raise ValueError(
                f"values has shape {list(self.values.shape)} and samples {list(self.samples.shape)}; [n, K] and [n] "
                "are needed."
            )
        if not np.isfinite(self.values).all():
            raise ValueError(f"values of score {self.score!r} hold infinities or NaNs; does the model's loss diverge?")

    def lookup(self, indices: np.ndarray) -> np.ndarray:
        """Scores of samples, [len(indices), K]; a sample that was not scored gets the mean of those that were."""
        indices = np.asarray(indices)
        position = np.minimum(np.searchsorted(self.samples, indices), len(self.samples) - 1)
        known = self.samples[position] == indices
        return np.where(known[:, None], self.values[position], self.values.mean(0))

    def save(self, path: str | os.PathLike) -> None:
        """Write the table as safetensors."""
        tensors = {"samples": self.samples.astype(np.int64), "values": self.values.astype(np.float32)}
        save_file(tensors, path, metadata={"score": json.dumps(self.score)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> ScoreTable:
        """Read a table back."""
        with safe_open(path, framework="numpy") as file:
            return cls(json.loads(file.metadata()["score"]), file.get_tensor("samples"), file.get_tensor("values"))


def score_samples(
    model: nn.Module, partition: Partition, batches: Iterable[dict[str, Tensor]], score: str, progress: bool = True
) -> ScoreTable:
    """Score every sample of some batches, each of which carries its samples' indices under ``d2ft_index``.

    Args:
        model: The model, on the batches' device.
        partition: Its subnets.
        batches: Batches with labels and indices.
        score: Name of a gradient score.
        progress: Whether to show a progress bar.
    """
    samples, values = [], []
    with preserved_rng():
        for batch in tqdm(batches, desc=f"D2FT: scoring samples by {score}", disable=not progress):
            batch = dict(batch)
            samples.append(np.asarray(batch.pop(INDEX_KEY).cpu()))
            values.append(gradient_scores(model, partition, batch, score))
    order = np.argsort(np.concatenate(samples), kind="stable")
    return ScoreTable(score, np.concatenate(samples)[order], np.concatenate(values)[order].astype(np.float32))


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Give every random stream (Python, numpy, torch on all devices) back as it was."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
