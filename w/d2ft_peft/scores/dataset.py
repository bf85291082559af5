"""Batches that know which samples of the data set they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from .table import INDEX_KEY


class IndexedDataset(Dataset):
    """A map-style data set whose items come with their index, as pairs.

    Args:
        dataset: The data set.
        indices: Indices to expose, all by default.
    """

    def __init__(self, dataset: Any, indices: Sequence[int] | None = None):
        self.dataset = dataset
        self.indices = range(len(dataset)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Any]:
        index = int(self.indices[position])
        return index, self.dataset[index]

    def __getitems__(self, positions: Sequence[int]) -> list[tuple[int, Any]]:
        indices = [int(self.indices[position]) for position in positions]
        if hasattr(self.dataset, "__getitems__"):
            return list(zip(indices, self.dataset.__getitems__(indices), strict=True))
        return [(index, self.dataset[index]) for index in indices]


class IndexedCollator:
    """Collates pairs from `IndexedDataset`: the batch carries the indices under ``d2ft_index``.

    Args:
        collator: Collates the items themselves.
    """

    def __init__(self, collator: Callable[[list], dict]):
        self.collator = collator

    def __call__(self, pairs: list[tuple[int, Any]]) -> dict:
        indices, items = zip(*pairs, strict=True)
        batch = self.collator(list(items))
        batch[INDEX_KEY] = torch.tensor(indices)
        return batch
