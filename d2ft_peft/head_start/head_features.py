"""What a model's head reads, collected while the model runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..partition import base_model
from ..processes import all_reduce, rank, world_size
from ..scores import IGNORED, INDEX_KEY
from .linear_head import HeadStartRefused, LinearHead, coded, decode


# Elements of a block of rows, so that no step of the fit needs a second copy of all of them.
_BLOCK_ELEMENTS = 1 << 22


class HeadFeatures:
    """Collects the inputs of a model's head and their labels, while it is entered.

    A sample that comes a second time is left out, as are rows whose label is -100.

    Args:
        model: The model, as it is called.
        head: Its head.
        capacity: Most rows that are kept in this process.

    Attributes:
        blocks: Inputs of the head, [rows, d] each; float64 in a model of that type, else float32.
        dropped: Rows that the capacity left no room for.
    """

    def __init__(self, model: nn.Module, head: LinearHead, capacity: int):
        self.model, self.head, self.capacity = model, head, capacity
        self.blocks: list[Tensor] = []
        self.dropped = self.size = 0
        self._room = 0
        self._targets: list[Tensor] = []
        self._samples: list[np.ndarray] = []
        self._seen: set[int] = set()
        self._indices: np.ndarray | None = None
        self._labels: Tensor | None = None
        self._x: Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> HeadFeatures:
        self._handles = [
            self.head.layer.register_forward_hook(self._note_input),
            self.model.register_forward_hook(self._collect),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def problem(self) -> str | None:
        """``"regression"``, ``"single_label_classification"`` or ``"multi_label_classification"``, by the rule of
        transformers; None before the first batch."""
        return _problem(base_model(self.model), self.head.layer.out_features, self._labels)

    def announcing(self, batches: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
        """The same batches, of which this object learns labels and indices before the model runs on them."""
        return _Announcing(batches, self)

    def run(self, batch: dict[str, Any]) -> None:
        """Run the model on an announced batch, for the features only."""
        inputs = {name: value for name, value in batch.items() if name not in (INDEX_KEY, "labels")}
        if self.head.selects:
            with coded(self.head.layer):
                self.model(**inputs)
        else:
            self.model(**inputs)

    def announce(self, batch: dict[str, Any]) -> None:
        """Learn labels and indices of the next batch.

        Raises:
            HeadStartRefused: If it has no labels.
        """
        self._labels = batch.get("labels")
        if not isinstance(self._labels, Tensor):
            raise HeadStartRefused("a batch has no labels, so no head can be fitted; set head_start=False.")
        indices = batch.get(INDEX_KEY)
        self._indices = None if indices is None else np.asarray(indices.cpu())

    def _note_input(self, layer: nn.Linear, args: tuple, output: Tensor) -> None:
        self._x = args[0].detach()

    def _collect(self, model: nn.Module, args: tuple, output: Any) -> None:
        x, self._x = self._x, None
        rows, outputs = x.reshape(-1, x.shape[-1]), self.head.layer.out_features
        if self.head.selects:
            rows = rows[decode(output.logits)]
        targets, kept = self._targets_of(rows, self._labels.to(rows.device), outputs)
        samples = self._samples_of(len(rows))
        if self._indices is not None:
            new = np.array([index not in self._seen for index in samples.tolist()], dtype=bool)
            kept = kept & torch.from_numpy(new).to(kept.device)
            self._seen.update(self._indices.tolist())
        self._append(rows[kept], targets[kept], samples[kept.cpu().numpy()])

    def _targets_of(self, rows: Tensor, labels: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
        """Targets of some rows, and which of them count."""
        if self.problem == "single_label_classification":
            fits, targets = labels.numel() == len(rows), labels.reshape(-1).long()
        else:
            fits = labels.numel() == len(rows) * outputs
            targets = labels.reshape(len(rows), outputs).to(_wide(rows.dtype)) if fits else labels
        if not fits:
            raise HeadStartRefused(
                f"labels of shape {list(labels.shape)} do not fit a head that read {len(rows)} rows and has {outputs} "
                f"outputs ({self.problem}): samples that are packed into one row have no features of their own. Set "
                "head_start=False."
            )
        kept = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        return targets, targets != IGNORED if targets.ndim == 1 else kept

    def _samples_of(self, rows: int) -> np.ndarray:
        """Index of the sample of each row; -1 where it is not known."""
        if self._indices is None:
            return np.full(rows, -1)
        return np.repeat(self._indices, rows // len(self._indices))

    def _append(self, rows: Tensor, targets: Tensor, samples: np.ndarray) -> None:
        space = min(len(rows), self.capacity - self.size)
        self.dropped += len(rows) - space
        rows, targets, samples = rows[:space], targets[:space], samples[:space]
        self._targets.append(targets)
        self._samples.append(samples)
        self.size += space
        while len(rows):
            if not self._room:
                self._room = max(1, _BLOCK_ELEMENTS // rows.shape[1])
                self.blocks.append(rows.new_empty((self._room, rows.shape[1]), dtype=_wide(rows.dtype)))
            count = min(self._room, len(rows))
            start = len(self.blocks[-1]) - self._room
            self.blocks[-1][start : start + count] = rows[:count]
            self._room -= count
            rows = rows[count:]

    def take(self) -> tuple[list[Tensor], Tensor]:
        """Blocks [rows, d] and targets of all their rows ([n], or [n, C]); those of several processes have no sample
        in common, of which each would have been padded with some to make equally many."""
        device = self.head.layer.weight.device
        d = self.head.layer.in_features
        if not self.blocks:
            nothing = torch.empty((0, d), device=device, dtype=_wide(self.head.layer.weight.dtype))
            return [nothing], torch.empty(0, dtype=torch.long, device=device)
        blocks, targets = self.blocks, torch.cat(self._targets)
        blocks[-1] = blocks[-1][: len(blocks[-1]) - self._room]
        mine = torch.from_numpy(self._owned(np.concatenate(self._samples))).to(device)
        if not bool(mine.all()):
            sizes = [len(block) for block in blocks]
            blocks = [block[own] for block, own in zip(blocks, mine.split(sizes), strict=True)]
            targets = targets[mine]
        return blocks, targets

    def _owned(self, samples: np.ndarray) -> np.ndarray:
        """Which rows belong to this process: those of samples that no process before it has, too; bool [rows]."""
        if world_size() == 1:
            return np.ones(len(samples), dtype=bool)
        highest = int(all_reduce(np.array([float(samples.max(initial=-1))]), dist.ReduceOp.MAX)[0])
        owner = np.full(highest + 1, float(world_size()))
        owner[samples[samples >= 0]] = rank()
        owner = all_reduce(owner, dist.ReduceOp.MIN)
        return np.where(samples >= 0, owner[samples] == rank(), True) if highest >= 0 else samples < 0


class _Announcing:
    def __init__(self, batches: Iterable[dict[str, Any]], features: HeadFeatures):
        self.batches, self.features = batches, features

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.batches:
            self.features.announce(batch)
            yield batch

    def __len__(self) -> int:
        return len(self.batches)


def _problem(base: nn.Module, outputs: int, labels: Tensor | None) -> str | None:
    known = getattr(getattr(base, "config", None), "problem_type", None)
    if known is not None or labels is None:
        return known
    if outputs == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
