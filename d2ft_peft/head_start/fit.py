"""Fits a model's head to what it reads: one pass without gradients, and a linear model of its features."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..costs import flop_counter, inference
from ..processes import all_reduce, rank
from ..scores import preserved_rng
from ..value_checks import check, is_number
from .head_features import HeadFeatures
from .linear_fit import L2, fit_linear
from .linear_head import HeadStartRefused, find_head


FEATURE_BYTES = 1 << 30
"""Most memory that features take in a process."""


@dataclass(frozen=True)
class HeadStart:
    """A head that was fitted before the first step, and what that cost.

    Attributes:
        head: Name of the layer.
        problem: What it was fitted to, as transformers calls it.
        samples: Rows of features, in all processes: samples, or tokens where each has a label.
        features, outputs: Inputs and outputs of the layer.
        flops: Of the pass (forward) and of the fit, in all processes.
        flops_here: Of this process alone.
        seconds: Wall-clock time of both.
        loss_before, loss_after: Mean training loss over the features, with the head as it was and as it is.
        accuracy: Share of right classes (or labels) among them, or None for regression.
    """

    head: str
    problem: str
    samples: int
    features: int
    outputs: int
    flops: float
    flops_here: float
    seconds: float
    loss_before: float
    loss_after: float
    accuracy: float | None

    def logs(self) -> dict[str, float]:
        """What goes into the Trainer's log."""
        names = ("samples", "flops", "seconds", "loss_before", "loss_after", "accuracy")
        values = {f"head_start_{name}": getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


def fit_head(model: nn.Module, batches: Iterable[dict[str, Any]], l2: float = L2, progress: bool = True) -> HeadStart:
    """Fit the head of a model, in place, to the features of some labelled batches; for training loops of one's own.

    Call it once, when the model is wrapped and before the first step; the optimizer may exist already. In a run of
    several processes each gives batches of its own, as many as the others or not. Random state is left as it was.

    Args:
        model: A model whose head is trained (``modules_to_save``, ``train_boundary``).
        batches: Batches with ``labels``: the training samples, or a part of them. At most as many rows are used as
            fit into 1 GiB a process.
        l2: Weight of the penalty on the weights of standardised features.
        progress: Whether process 0 shows a progress bar.

    Raises:
        ValueError: If no trained linear layer makes the logits, or there is nothing to fit it to.
    """
    check(isinstance(model, nn.Module), "model", model, "must be a model")
    check(isinstance(batches, Iterable) and not isinstance(batches, Mapping | str | bytes), "batches", batches,
          "must be a data loader, or a list of batches")  # fmt: skip
    check(is_number(l2) and 0 <= l2 < float("inf"), "l2", l2, "must be a finite number, not negative")
    started, iterator = time.perf_counter(), iter(batches)
    with preserved_rng():
        first = next(iterator, None)
        if first is None:
            raise ValueError("batches is empty: give at least one batch with labels.")
        check(isinstance(first, Mapping), "batches", batches, "must give dictionaries of tensors")
        head = find_head(model, first)
        features = HeadFeatures(model, head, capacity(head.layer))
        flops = collect(model, features, itertools.chain([first], iterator), progress and rank() == 0)
        return fit_features(features, flops, started, l2)


def capacity(layer: nn.Linear) -> int:
    """Most rows of a layer's inputs that are kept in a process."""
    size = torch.promote_types(layer.weight.dtype, torch.float32).itemsize
    return max(1, FEATURE_BYTES // (size * layer.in_features))


def collect(model: nn.Module, features: HeadFeatures, batches: Iterable[dict[str, Any]], progress: bool) -> float:
    """Run a model over batches as at inference, for the features of its head only; returns the FLOPs.

    Batches of one shape cost the same, so each shape is counted once.
    """
    device, known, flops = next(model.parameters()).device, {}, 0.0
    with features, inference(model), torch.no_grad():
        for batch in tqdm(features.announcing(batches), desc="D2FT: features of the head", disable=not progress):
            batch = send_to_device(batch, device)
            shape = tuple(sorted((name, v.shape) for name, v in batch.items() if isinstance(v, Tensor)))
            if shape in known:
                features.run(batch)
            else:
                with flop_counter() as counter:
                    features.run(batch)
                known[shape] = counter.get_total_flops()
            flops += known[shape]
    return flops


@torch.no_grad()
def fit_features(features: HeadFeatures, flops: float, started: float, l2: float = L2) -> HeadStart:
    """Fit a head to collected features, and write it in place; classes without a sample keep their row.

    Args:
        features: The features; they are used up.
        flops: What this process computed to have them.
        started: When that began, by `time.perf_counter`.
        l2: Weight of the penalty.

    Raises:
        ValueError: See `fit_linear`.
    """
    layer, problem = features.head.layer, features.problem
    blocks, targets = features.take()
    fit = fit_linear(blocks, targets, problem, layer.weight, layer.bias, l2)
    layer.weight.copy_(fit.weight)
    if layer.bias is not None:
        layer.bias.copy_(fit.bias)
    flops += 2.0 * len(targets) * layer.in_features * fit.products
    everywhere = float(all_reduce(torch.tensor([flops], dtype=torch.float64).numpy())[0])
    return HeadStart(
        features.head.name, problem, fit.rows, layer.in_features, layer.out_features, everywhere, flops,
        time.perf_counter() - started, fit.loss_before, fit.loss, fit.accuracy,
    )  # fmt: skip


def agree(refusal: HeadStartRefused | None) -> None:
    """Let all processes refuse if one does, before they would wait for it.

    Raises:
        HeadStartRefused: In every process, if one has a refusal.
    """
    if float(all_reduce(torch.tensor([float(refusal is not None)], dtype=torch.float64).numpy())[0]):
        raise refusal or HeadStartRefused("another process could not read the features of its samples.")
