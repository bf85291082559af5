"""Scores of a data set's samples: computed once, saved, looked up by the samples' indices."""

from __future__ import annotations

import hashlib
import json
import os
import random
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import find_labels

from ..partition import Partition, base_model
from ..whole_files import reading, replacing
from .contribution import gradient_scores


INDEX_KEY = "d2ft_index"
"""Key under which a batch carries the indices of its samples in the data set."""

_FINGERPRINT_ROWS = 1024


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """Scores [n, K] of n samples with their indices [n] in the data set. Not to be changed once it is made.

    Attributes:
        score: Name of the score.
        samples: Indices of the scored samples, int64 [n], ascending; those without a finite score are not among them.
        values: Their scores, float32 [n, K], finite.

    Raises:
        ValueError: If the shapes do not fit, or a value is not finite.
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
        # Smallest and largest are NaN if any value is; unlike a mask they take no memory.
        if self.values.size and not (np.isfinite(self.values.min()) and np.isfinite(self.values.max())):
            raise ValueError(
                f"values of score {self.score!r} hold infinities or NaNs; leave those samples out, they count like "
                "the mean of the others."
            )

    def require_samples(self) -> ScoreTable:
        """The table itself. Raises ValueError if it holds no sample: then there is nothing to go by."""
        if not len(self.samples):
            raise ValueError(
                f"no sample has a finite score {self.score!r}, so there is nothing to schedule by; check the model's "
                "loss on the training data (it diverges, or the weights' type overflows), or choose "
                "policy='bilevel' with backward_score='weight_magnitude'."
            )
        return self

    @cached_property
    def mean(self) -> np.ndarray:
        """Mean over the samples, float64 [K]: the score of one that is not in the table."""
        return self.require_samples().values.mean(0, dtype=np.float64)

    @cached_property
    def fingerprint(self) -> str:
        """Tells tables apart, hexadecimal: from the indices, the means and some of the rows, so that it costs little
        more than to read the table once."""
        content = hashlib.sha256(f"{self.score} {self.values.shape}".encode())
        rows = np.linspace(0, len(self.samples) - 1, min(len(self.samples), _FINGERPRINT_ROWS)).astype(np.int64)
        means = self.mean if len(self.samples) else np.empty(0)
        for array, dtype in ((self.samples, "<i8"), (means, "<f8"), (self.values[rows], "<f4")):
            content.update(np.ascontiguousarray(array, dtype=dtype).data)
        return content.hexdigest()

    def lookup(self, indices: np.ndarray) -> np.ndarray:
        """Scores of samples, float32 [len(indices), K]; one that is not in the table gets the mean of those that are.

        Raises:
            ValueError: If the table holds no sample.
        """
        mean = self.mean
        indices = np.asarray(indices)
        position = np.minimum(np.searchsorted(self.samples, indices), len(self.samples) - 1)
        found = self.values[position]
        found[self.samples[position] != indices] = mean
        return found

    def save(self, path: str | os.PathLike) -> None:
        """Write the table as safetensors, as a whole or not at all."""
        arrays = {"samples": self.samples.astype(np.int64), "values": self.values.astype(np.float32, copy=False)}
        with replacing(os.fspath(path)) as temporary:
            save_file(arrays, temporary, metadata={"score": json.dumps(self.score)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> ScoreTable:
        """Read a table back.

        Raises:
            ValueError: If the file is missing, damaged or no table; the message names it.
        """
        with reading(os.fspath(path), "numpy") as file:
            facts, names = file.metadata() or {}, set(file.keys())
            if "score" not in facts or names != {"samples", "values"}:
                raise ValueError(f"{os.fspath(path)!r} is no table of scores; it holds {sorted(names)}.")
            return cls(json.loads(facts["score"]), file.get_tensor("samples"), file.get_tensor("values"))


def score_samples(
    model: nn.Module, partition: Partition, batches: Iterable[dict[str, Tensor]], score: str, progress: bool = True
) -> ScoreTable:
    """Score every sample of some batches, each of which carries its samples' indices under ``d2ft_index``.

    A sample whose score is infinite or NaN is left out, with a warning: it counts like the mean of the others.

    Args:
        model: The model, on the batches' device.
        partition: Its subnets.
        batches: Batches with labels and indices; their rows are the samples.
        score: Name of a gradient score.
        progress: Whether to show a progress bar.

    Returns:
        The table, with no sample where none has a finite score (`ScoreTable.require_samples`).

    Raises:
        ValueError: If the rows of a batch are not its samples, or it has no labels.
    """
    samples, values = [np.empty(0, dtype=np.int64)], [np.empty((0, partition.num_scheduled), dtype=np.float32)]
    with preserved_rng():
        for batch in tqdm(batches, desc=f"D2FT: scoring samples by {score}", disable=not progress):
            batch = dict(batch)
            indices = np.asarray(batch.pop(INDEX_KEY).cpu())
            _check_rows(model, batch, len(indices), score)
            rows = gradient_scores(model, partition, batch, score)
            with np.errstate(over="ignore"):
                rows = rows.astype(np.float32)
            finite = np.isfinite(rows).all(axis=1)
            samples.append(indices[finite])
            values.append(rows[finite])
            if not finite.all():
                warnings.warn(
                    f"samples {indices[~finite].tolist()} have an infinite or undefined score {score!r}; they count "
                    "like the mean of the others.",
                    stacklevel=2,
                )
    order = np.argsort(np.concatenate(samples), kind="stable")
    return ScoreTable(score, np.concatenate(samples)[order], np.concatenate(values)[order])


def _check_rows(model: nn.Module, batch: dict[str, Tensor], samples: int, score: str) -> None:
    labels = find_labels(type(base_model(model)))
    if labels and not set(labels) & set(batch):
        raise ValueError(
            f"score {score!r} is read from the gradients of the model's own loss, and a batch has {sorted(batch)} and "
            f"none of {labels}: a trainer that makes a loss of its own (preferences, rewards) needs none. Choose "
            "policy='fewer_samples', or 'bilevel' with both scores 'weight_magnitude'."
        )
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim]
    rows = len(batch["labels"]) if isinstance(batch.get("labels"), Tensor) else len(tensors[0])
    if rows != samples:
        raise ValueError(
            f"a batch has {rows} rows and {samples} samples: score {score!r} needs samples as rows, with padding. "
            "Use a collator that pads instead of one that joins or packs sequences, or choose policy='bilevel' with "
            "backward_score='weight_magnitude' and forward_score='weight_magnitude'."
        )


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
