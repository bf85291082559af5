"""Batches by sample: how many there are, and some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def batch_size(batch: Mapping[str, Any]) -> int:
    """Samples in a batch: the length of its first tensor.

    Raises:
        ValueError: If it has none.
    """
    for value in batch.values():
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise ValueError(f"a batch with keys {sorted(batch)} has no tensor; micro-batches are dictionaries of tensors.")


def of_samples(value: Any, which: slice | Sequence[int], size: int) -> Any:
    """The part of a value that belongs to some samples: rows of a tensor that has one for each; all else as it is.

    Args:
        value: A tensor, or anything else.
        which: The samples.
        size: How many there are.
    """
    return value[which] if isinstance(value, Tensor) and value.ndim and len(value) == size else value


def some_samples(batch: Mapping[str, Any], which: slice | Sequence[int], size: int | None = None) -> dict[str, Any]:
    """A batch of some of its samples; `size` where its first tensor does not tell how many there are."""
    size = batch_size(batch) if size is None else size
    return {name: of_samples(value, which, size) for name, value in batch.items()}
