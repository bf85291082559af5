"""Training data of one session: batches that carry facts, candidates loaded once chosen, samples scored beforehand."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from ..head_start import HeadFeatures
from ..partition import base_model
from ..planning import D2FTPlanner
from ..planning.facts import FACTS_KEY, BatchFacts, facts_of, take_facts
from ..scores import (
    CANDIDATES_KEY,
    INDEX_KEY,
    CandidateCollator,
    CandidateDataset,
    IndexedCollator,
    IndexedDataset,
    gather_tables,
    load_items,
    preserved_rng,
    score_samples,
)
from .flattening import Flattening
from .sample_lengths import SampleLengths


class TrainingData:
    """What a session's data loaders give out.

    Args:
        trainer: The Trainer, whose collator and columns are used.
        planner: Tells what has to be known of the samples.
        make_loader: The Trainer's own way to make a data loader.
    """

    def __init__(self, trainer: Trainer, planner: D2FTPlanner, make_loader: Callable[..., DataLoader]):
        self.trainer, self.planner, self._make_loader = trainer, planner, make_loader
        self._items: Any = None
        self._collator: Callable[[list], dict] | None = None
        decodes = planner.partition.several and base_model(planner.model).config.is_encoder_decoder
        self._lengths = SampleLengths(targets=decodes)
        self._flatten = Flattening(planner.model) if planner.config.padding == "flatten" else None

    def loader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> DataLoader:
        """A data loader of training batches. They carry what planning has to know of them; under a policy over samples
        they are candidates, of which those that run are loaded later by `collate`.

        Raises:
            ValueError: If samples have to be told apart, and the data set or the way it is shared out does not let it.
        """
        planner, args_ = self.planner, self.trainer.args
        if args_.world_size > 1 and args_.accelerator_config.even_batches is False and not args_.dataloader_drop_last:
            raise ValueError(
                "even_batches=False leaves some processes without a batch at the end of an epoch, for which the others "
                "would wait for ever; leave it out, or set dataloader_drop_last=True."
            )
        if planner.config.rows is None and planner.schedules_samples and (why := self._why_not_by_sample(dataset)):
            planner.rows = "micro_batches"
            warnings.warn(
                f"policy={planner.config.policy!r}: {why}, so that whole micro-batches are left out instead of "
                "samples, and none are composed by length; set rows='micro_batches' to say that this is meant.",
                stacklevel=2,
            )
        if not planner.source.by_sample and not planner.schedules_samples:
            if self.is_dispatched(dataset):
                return self._make_loader(dataset, description, *args, **kwargs)
            collator = FactsCollator(self.trainer.data_collator, planner.shifts_labels)
            return self._with_collator(collator, dataset, description, *args, **kwargs)
        if why := self._why_not_by_sample(dataset):
            self._refuse(why)
        sampler_fn = kwargs.get("sampler_fn")
        if sampler_fn is not None:
            kwargs["sampler_fn"] = lambda _: sampler_fn(dataset)
        items, collator = self._without_unused_columns(dataset, description)
        if not planner.schedules_samples:
            collator = FactsCollator(collator, planner.shifts_labels, indexed=True)
            return self._with_collator(collator, IndexedDataset(items), description, *args, **kwargs)
        self._items, self._collator = items, collator
        # Workers load ahead, in parallel; without them nothing is loaded that does not run.
        wrapper = IndexedDataset if args_.dataloader_num_workers else CandidateDataset
        return self._with_collator(CandidateCollator(), wrapper(items), description, *args, **kwargs)

    def collate(self, indices: np.ndarray, items: dict[int, Any]) -> tuple[dict, BatchFacts]:
        """Load what is not loaded yet, and collate; returns the batch and its facts.

        Args:
            indices: Of the samples in the data set.
            items: Those that are loaded, by index; gets the others.
        """
        self._load(indices, items)
        chosen = [items[int(index)] for index in indices]
        if self._flatten is not None and len(chosen) > 1:
            batch = self._flatten(chosen)
            facts = facts_of(batch, self.planner.shifts_labels, len(indices), indices)
            lengths = np.array([len(item["input_ids"]) for item in chosen])
            return batch, dataclasses.replace(facts, lengths=lengths, tokens=int(lengths.sum()))
        batch = self._collator(chosen)
        if not isinstance(batch, Mapping):
            return batch, take_facts(batch, self.planner.shifts_labels)  # which says why it cannot be scheduled
        batch = dict(batch)
        return batch, facts_of(batch, self.planner.shifts_labels, len(indices), indices)

    def _load(self, indices: Iterable[int], items: dict[int, Any]) -> None:
        missing = list(dict.fromkeys(int(index) for index in indices if int(index) not in items))
        if missing:
            items.update(zip(missing, load_items(self._items, missing), strict=True))

    def gives_candidates(self, batches: list[dict]) -> bool:
        """Whether batches are candidates of this session's own data loader; those of another one are collated already.

        Raises:
            ValueError: If they are not, and the configuration asks for samples.
        """
        if all(CANDIDATES_KEY in batch for batch in batches):
            return True
        config = self.planner.config
        if config.rows is None:
            warnings.warn(
                f"policy={config.policy!r}: {type(self.trainer).__name__}.get_train_dataloader gives batches that are "
                "already collated, so that whole micro-batches are left out instead of samples, and none are composed "
                "by length; a sampler of your own goes into _get_train_sampler.",
                stacklevel=2,
            )
            return False
        raise ValueError(
            f"policy={config.policy!r} schedules samples before they are loaded, and "
            f"{type(self.trainer).__name__}.get_train_dataloader gives batches that are already collated; do not "
            "override it (a sampler of your own goes into _get_train_sampler), or set rows='micro_batches' with "
            "backward_score='weight_magnitude'."
        )

    def given(self, batches: list[dict]) -> tuple[np.ndarray, dict[int, Any]]:
        """Indices of the candidates of some batches, int [n], and their items by index, as far as they are loaded."""
        indices = torch.cat([batch[INDEX_KEY] for batch in batches]).cpu().numpy()
        items = [item for batch in batches for item in batch[CANDIDATES_KEY].items]
        return indices, {int(index): item for index, item in zip(indices, items, strict=True) if item is not None}

    def lengths(self, indices: np.ndarray, items: dict[int, Any]) -> np.ndarray | None:
        """Tokens of samples, int [n] or [n, 2] (`SampleLengths.of`), where micro-batches are to be composed by them and
        they differ; else None."""
        if self.planner.config.padding == "keep" or not self._lengths.differ:
            return None
        return self._lengths.of(indices, items, self._load)

    def score_once(self, features: HeadFeatures | None = None) -> None:
        """Score the training samples before the first step (or a fraction of them), where a score was asked for that
        takes a pass; what it costs counts as training.

        Args:
            features: Collects what the head reads in the same pass.
        """
        planner = self.planner
        for score in planner.source.before_training:
            if score in planner.scores:
                continue
            chosen = np.sort(self.draw(self.num_scored))
            with preserved_rng(), features or contextlib.nullcontext():
                loader = self.pass_over(chosen)
                batches = features.announcing(loader) if features else loader
                table = score_samples(planner.model, planner.partition, batches, score, planner.progress)
            if planner.costs.known:
                self.trainer.current_flos += planner.cost_model.full_flops(np.array([float(len(table.samples))]))
            planner.scores[score] = gather_tables(table)

    @property
    def num_scored(self) -> int:
        """Number of the training samples that are scored before training, where a score takes a pass."""
        return max(1, round(len(self.trainer.train_dataset) * self.planner.config.score_fraction))

    def draw(self, count: int) -> np.ndarray:
        """Indices of so many training samples at random, the same in all processes; of more, the same ones first."""
        rows = len(self.trainer.train_dataset)
        return np.random.default_rng(self.planner.config.seed).permutation(rows)[:count]

    def pass_over(self, indices: np.ndarray) -> DataLoader:
        """A data loader that gives these samples once, those of about the same length together, without training on
        them; batches carry the indices."""
        lengths = None if self._items is None else self.lengths(indices, {})
        if lengths is not None:
            indices = indices[np.argsort(lengths.reshape(len(lengths), -1).sum(axis=1), kind="stable")]
        dataset, collator = self._without_unused_columns(self.trainer.train_dataset, "Scoring")
        return self._with_collator(
            IndexedCollator(collator), IndexedDataset(dataset, indices), "Scoring",
            batch_size=self.trainer.args.per_device_train_batch_size,
        )  # fmt: skip

    def is_dispatched(self, dataset: Any) -> bool:
        """Whether the first process collates for all, so that a batch is cut into parts afterwards."""
        args = self.trainer.args
        dispatches = args.accelerator_config.dispatch_batches
        return args.world_size > 1 and bool(isinstance(dataset, IterableDataset) if dispatches is None else dispatches)

    def _why_not_by_sample(self, dataset: Any) -> str | None:
        """Why samples cannot be told apart, or None if they can."""
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            return "a data set without length and indices does not let samples be told apart"
        if self.is_dispatched(dataset):
            return (
                "dispatch_batches=True lets the first process load for all, and the others would not know which "
                "samples they got"
            )
        return None

    def _refuse(self, why: str) -> None:
        config = self.planner.config
        raise ValueError(
            f"{why}, and policy={config.policy!r} with backward_score={config.backward_score!r} and "
            f"forward_score={config.forward_score!r} schedules samples or looks their scores up; give a map-style data "
            "set that each process loads itself, or choose policy='bilevel' with rows='micro_batches' and both scores "
            "'weight_magnitude'."
        )

    def _without_unused_columns(self, dataset: Any, description: str) -> tuple[Any, Callable]:
        """The data set and its collator, as the Trainer would clean them of columns that the model does not take."""
        trainer = self.trainer
        if isinstance(dataset, Dataset):
            return trainer._remove_unused_columns(dataset, description=description), trainer.data_collator
        return dataset, trainer._get_collator_with_removed_columns(trainer.data_collator, description=description)

    def _with_collator(
        self, collator: Callable, dataset: Any, description: str, *args: Any, **kwargs: Any
    ) -> DataLoader:
        trainer = self.trainer
        own, trainer.data_collator = trainer.data_collator, collator
        try:
            return self._make_loader(dataset, description, *args, **kwargs)
        finally:
            trainer.data_collator = own


class FactsCollator:
    """Collates, and lets the batch carry its facts: they are known here for nothing, on the host.

    Args:
        collator: Collates the items.
        shifts: See `facts_of`.
        indexed: Whether items come in pairs with their indices in the data set (`IndexedDataset`).
    """

    def __init__(self, collator: Callable[[list], Any], shifts: bool, indexed: bool = False):
        self.collator, self.shifts, self.indexed = collator, shifts, indexed

    def __call__(self, items: list) -> Any:
        indices, items = zip(*items, strict=True) if self.indexed else (None, items)
        batch = self.collator(list(items))
        if not isinstance(batch, Mapping):
            return batch  # of which the planner says that it cannot schedule it
        return {**batch, FACTS_KEY: facts_of(batch, self.shifts, len(items), indices)}
