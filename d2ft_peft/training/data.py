"""Training data by index: candidates that are loaded once they are chosen, and samples that are scored beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset

from ..processes import gather_samples
from ..scores import (
    INDEX_KEY,
    CandidateCollator,
    CandidateDataset,
    IndexedCollator,
    IndexedDataset,
    ScoreTable,
    load_items,
    preserved_rng,
    score_samples,
)


class IndexedDataMixin:
    """The part of `D2FTTrainerMixin` that deals with data sets and data loaders."""

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> DataLoader:
        """Training batches carry their samples' indices where the policy looks at scores of samples."""
        if not kwargs.get("is_training"):
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        planner = self._start()
        if not planner.source.by_sample and not planner.schedules_samples:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"policy={planner.config.policy!r} schedules samples or looks their scores up, and a data set without "
                "length and indices does not let it; choose policy='bilevel' with backward_score='weight_magnitude', "
                "or a map-style data set."
            )
        sampler_fn = kwargs.get("sampler_fn")
        if sampler_fn is not None:
            kwargs["sampler_fn"] = lambda _: sampler_fn(dataset)
        dataset, collator = self._without_unused_columns(dataset, description)
        if planner.schedules_samples:
            self._candidate_items, self._candidate_collator = dataset, collator
            # Workers load ahead, in parallel; without them nothing is loaded that does not run.
            wrapper = IndexedDataset if self.args.dataloader_num_workers else CandidateDataset
            return self._wrapped_dataloader(wrapper(dataset), CandidateCollator(), description, *args, **kwargs)
        return self._wrapped_dataloader(
            IndexedDataset(dataset), IndexedCollator(collator), description, *args, **kwargs
        )

    def _without_unused_columns(self, dataset: Any, description: str) -> tuple[Any, Callable]:
        """The data set and its collator, as the Trainer would clean them of columns that the model does not take."""
        if isinstance(dataset, Dataset):
            return self._remove_unused_columns(dataset, description=description), self.data_collator
        return dataset, self._get_collator_with_removed_columns(self.data_collator, description=description)

    def _wrapped_dataloader(
        self, dataset: Any, wrapper: Callable, description: str, *args: Any, **kwargs: Any
    ) -> DataLoader:
        collator, self.data_collator = self.data_collator, wrapper
        try:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            self.data_collator = collator

    def _score_once(self) -> None:
        """Score the training samples before the first step, as the paper does (or a fraction of them)."""
        planner = self.planner
        for score in planner.source.before_training:
            if score in planner.scores:
                continue
            rows = len(self.train_dataset)
            count = max(1, round(rows * planner.config.score_fraction))
            chosen = np.sort(np.random.default_rng(planner.config.seed).permutation(rows)[:count])
            with preserved_rng():
                dataset, collator = self._without_unused_columns(self.train_dataset, "Scoring")
                loader = self._wrapped_dataloader(
                    IndexedDataset(dataset, chosen), IndexedCollator(collator), "Scoring",
                    batch_size=self.args.per_device_train_batch_size,
                )  # fmt: skip
                table = score_samples(planner.model, planner.partition, loader, score, planner.progress)
            planner.scores[score] = self._gather_scores(table)

    @staticmethod
    def _gather_scores(table: ScoreTable) -> ScoreTable:
        """The tables of all processes in one; a sample that several have scored counts once."""
        samples, columns = gather_samples(table.samples, dict(enumerate(table.values.T)))
        samples, first = np.unique(samples, return_index=True)
        return ScoreTable(table.score, samples, np.stack([*columns.values()], axis=1)[first].astype(np.float32))

    def _collate(self, indices: np.ndarray, items: list) -> dict:
        """Load what is not loaded yet, and collate."""
        if items[0] is None:
            items = load_items(self._candidate_items, [int(index) for index in indices])
        return {**self._candidate_collator(items), INDEX_KEY: torch.from_numpy(indices)}
