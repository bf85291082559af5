"""Batches that know which samples of the data set they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from .score_table import INDEX_KEY


CANDIDATES_KEY = "d2ft_candidates"
"""Key of items that are not collated yet."""


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
        return list(zip(indices, load_items(self.dataset, indices), strict=True))


def load_items(dataset: Any, indices: Sequence[int]) -> list:
    """Items of a map-style data set, in one call where it allows that."""
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(list(indices))
    return [dataset[index] for index in indices]


class CandidateDataset(IndexedDataset):
    """Gives out the indices of items and not the items: who trains is decided first, then loaded."""

    def __getitem__(self, position: int) -> tuple[int, Any]:
        return int(self.indices[position]), None

    def __getitems__(self, positions: Sequence[int]) -> list[tuple[int, Any]]:
        return [self[position] for position in positions]


@dataclass
class Candidates:
    """Items that are not collated yet. Not a list: what moves batches to a device leaves it alone.

    Attributes:
        items: The items, None where they are not loaded.
    """

    items: list


class CandidateCollator:
    """Keeps pairs apart, for `CandidateDataset` or `IndexedDataset`: indices and `Candidates`."""

    def __call__(self, pairs: list[tuple[int, Any]]) -> dict:
        indices, items = zip(*pairs, strict=True)
        return {INDEX_KEY: torch.tensor(indices), CANDIDATES_KEY: Candidates(list(items))}


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
