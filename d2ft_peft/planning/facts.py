"""What planning has to know of a batch, read off on the host: no device is asked, and no process waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batches import batch_size
from ..scores import IGNORED, INDEX_KEY


FACTS_KEY = "d2ft_facts"
"""Key under which a batch carries its `BatchFacts` from the collator to the planner, which takes them out."""


@dataclass(frozen=True)
class BatchFacts:
    """What planning has to know of a micro-batch.

    Attributes:
        size: Samples.
        items: Labels that carry loss; None where there are no labels to count.
        indices: Indices of the samples in the data set, int64 [size], or None.
        length: Tokens of a sample, padded ones included; None where the batch holds no token ids.
        tokens: Tokens of all samples that are no padding; None where a mask on the host does not tell.
        lengths: Tokens of each sample, int [size], where they lie in one row; else None.
    """

    size: int
    items: int | None = None
    indices: np.ndarray | None = None
    length: int | None = None
    tokens: int | None = None
    lengths: np.ndarray | None = None


def facts_of(batch: Mapping[str, Any], shifts: bool, size: int | None = None, indices: Any = None) -> BatchFacts:
    """Look at a collated batch.

    Args:
        batch: The batch.
        shifts: Whether the model's loss predicts the next token, so that each row's first label counts for nothing.
        size: Number of its samples; by default the length of its first tensor.
        indices: Their indices in the data set; by default those under ``d2ft_index``.

    Raises:
        ValueError: If the batch has no tensor.
    """
    indices = batch.get(INDEX_KEY) if indices is None else indices
    indices = None if indices is None else np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices)
    size = batch_size(batch) if size is None else size
    return BatchFacts(size, _count_items(batch, shifts), indices, token_length(batch), _count_tokens(batch))


def take_facts(batch: dict[str, Any], shifts: bool) -> BatchFacts:
    """The facts that a batch carries, or else those that it shows; what is not for the model is removed from it."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a batch is a {type(batch).__name__}, and micro-batches are dictionaries of tensors: a trainer that makes "
            "its model inputs within a step gives D2FT nothing to schedule (TRL's GRPOTrainer and RLOOTrainer are "
            "followed); leave D2FT's callback or mixin out, and the adapter trains as a whole."
        )
    facts = batch.pop(FACTS_KEY, None)
    facts = facts_of(batch, shifts) if facts is None else facts
    batch.pop(INDEX_KEY, None)
    return facts


def token_length(batch: Mapping[str, Any]) -> int | None:
    """Length of the widest row of token ids in a batch, or None if there is none."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim == 2]
    return max((t.shape[1] for t in tensors if t.dtype in (torch.int64, torch.int32)), default=None)


def _count_tokens(batch: Mapping[str, Any]) -> int | None:
    mask = batch.get("attention_mask")
    on_host = isinstance(mask, Tensor) and mask.ndim == 2 and mask.device.type == "cpu"
    return int(np.count_nonzero(mask.numpy())) if on_host else None


def shares_of_items(facts: Sequence[BatchFacts]) -> np.ndarray:
    """What each micro-batch counts in a mean over all: its items, or its samples where items are not known; [N]."""
    by_items = all(one.items is not None for one in facts)
    return np.array([one.items if by_items else one.size for one in facts], dtype=np.float64)


def _count_items(batch: Mapping[str, Any], shifts: bool) -> int | None:
    labels = batch.get("shift_labels")
    if labels is None:
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            return None
        labels = labels[..., 1:] if shifts and labels.ndim > 1 else labels
    return int((labels.cpu() != IGNORED).sum().numpy())
