"""A regularised linear model of features, fitted by L-BFGS without a copy of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..processes import all_reduce
from ..scores import IGNORED
from .linear_head import HeadStartRefused


L2 = 1e-2
"""Default weight of the penalty: half of it times the sum of the squared weights of standardised features."""
ITERATIONS = 60

# Elements of logits, and of what L-BFGS remembers, that are held at a time.
_LOGITS = 1 << 24
_HISTORY = 1 << 27


@dataclass(frozen=True)
class LinearFit:
    """A linear model of features as they were before they were standardised.

    Attributes:
        weight: float64 [C, d].
        bias: float64 [C], or None for a model without.
        rows: Rows of features in all processes.
        loss_before, loss: Mean loss over them, with the model that was there and with the fitted one: cross-entropy,
            squared error, or binary cross-entropy over rows and labels.
        accuracy: Share of right classes or labels; None for regression.
        products: Multiplications of all features with one output, in all that was computed.
    """

    weight: Tensor
    bias: Tensor | None
    rows: int
    loss_before: float
    loss: float
    accuracy: float | None
    products: int


@torch.no_grad()
def fit_linear(
    blocks: list[Tensor], targets: Tensor, problem: str, weight: Tensor, bias: Tensor | None, l2: float = L2
) -> LinearFit:
    """Minimise mean loss plus ``l2 / 2`` times the sum of the squared weights, over standardised features.

    Features of a model without bias are scaled, not centred; a bias is not penalised. The loss of a row is that of
    transformers for this problem, summed over labels where there are several. In a run of several processes every one
    calls it with its own rows, and all end with the same bits.

    Args:
        blocks: Features [rows, d], standardised in place.
        targets: Classes [n], or numbers [n, C].
        problem: As transformers calls it: ``"single_label_classification"``, ``"multi_label_classification"`` or
            ``"regression"``.
        weight, bias: The model that is there, [C, d] and [C]; classes without a sample keep their row of it.
        l2: Weight of the penalty.

    Raises:
        HeadStartRefused: If no row has a label that counts, or all have the same class.
        ValueError: If a feature or a target is not finite, or a class is out of range.
    """
    fitted = _fitted(targets, problem, len(weight))
    before = [None if given is None else given.detach().to(torch.float64, copy=True) for given in (weight, bias)]
    rows = int(all_reduce(np.array([float(len(targets))]))[0])
    there = _Objective(blocks, targets, problem, rows)
    loss_before = there(*before)[0]
    offset, scale = _standardise(blocks, rows, centre=bias is not None)
    if problem == "single_label_classification":
        targets = (fitted.cumsum(0) - 1)[targets]
    objective = _Objective(blocks, targets, problem, rows)
    classes = int(fitted.sum())
    slopes = torch.zeros(classes, weight.shape[1], dtype=torch.float64, device=scale.device)
    intercept = None if bias is None else slopes.new_zeros(classes)
    _minimise(objective, slopes, intercept, l2)
    loss, _, _, right = objective(slopes, intercept)
    before[0][fitted] = slopes / scale
    if bias is not None:
        before[1][fitted] = intercept - (slopes / scale) @ offset
    per_row = 1 if problem == "single_label_classification" else classes
    products = objective.evaluations * classes + there.evaluations * len(weight)
    accuracy = None if problem == "regression" else right / per_row
    return LinearFit(*before, rows, loss_before / per_row, loss / per_row, accuracy, 2 * products)


def _fitted(targets: Tensor, problem: str, outputs: int) -> Tensor:
    """Which outputs have something to be fitted to, bool [C]."""
    if not all_reduce(np.array([float(len(targets))]))[0]:
        raise HeadStartRefused("no sample has a label that counts, so no head can be fitted; set head_start=False.")
    if problem != "single_label_classification":
        if all_reduce(np.array([float((~targets.isfinite()).sum())]))[0]:
            raise ValueError("labels are infinite or undefined, so no head can be fitted to them; look at the data.")
        return torch.ones(outputs, dtype=torch.bool, device=targets.device)
    outside = (targets < 0) | (targets >= outputs)
    if all_reduce(np.array([float(outside.sum())]))[0]:
        raise ValueError(
            f"labels={targets[outside][:5].tolist()} must lie in [0, {outputs}), the number of the head's outputs, or "
            f"be {IGNORED}; set num_labels to the number of classes."
        )
    counts = all_reduce(torch.bincount(targets, minlength=outputs).cpu().double().numpy())
    if (counts > 0).sum() < 2:
        raise HeadStartRefused("all samples have the same class, so no head can be fitted; set head_start=False.")
    return torch.from_numpy(counts > 0).to(targets.device)


@torch.no_grad()
def _standardise(blocks: list[Tensor], rows: int, centre: bool) -> tuple[Tensor, Tensor]:
    """Standardise in place; returns what was subtracted and divided by, float64 [d]."""
    device = blocks[0].device

    def total(values: Tensor) -> Tensor:
        return torch.from_numpy(all_reduce(values.cpu().double().numpy())).to(device)

    sums = total(sum(b.sum(0, dtype=torch.float64) for b in blocks))
    if not bool(sums.isfinite().all()):
        raise ValueError(
            "features of the head are infinite or undefined: the model returns no numbers for some samples (a type of "
            "too small a range, or damaged inputs); look at its outputs, or set head_start=False."
        )
    mean = sums / rows
    offset = mean if centre else torch.zeros_like(mean)
    squares = total(sum((b - offset.to(b.dtype)).square().sum(0, dtype=torch.float64) for b in blocks))
    scale = (squares / rows).sqrt()
    # What varies by no more than the rounding of its own size is constant, and is left with nothing to say.
    constant = scale <= mean.abs() * 4 * torch.finfo(blocks[0].dtype).eps if centre else scale == 0
    scale = torch.where(constant, torch.ones_like(scale), scale)
    for block in blocks:
        block.sub_(offset.to(block.dtype)).div_(scale.to(block.dtype))
        if centre:
            block[:, constant] = 0
    return offset, scale


def _minimise(objective: _Objective, weight: Tensor, bias: Tensor | None, l2: float) -> None:
    """Change weight and bias in place to where the penalised loss is least."""
    parameters = [weight] if bias is None else [weight, bias]
    history = int(max(2, min(10, _HISTORY // weight.numel())))
    optimizer = torch.optim.LBFGS(
        [p.requires_grad_() for p in parameters], max_iter=ITERATIONS, history_size=history,
        tolerance_grad=1e-6, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        flat = weight.detach()
        loss, of_weight, of_bias, _ = objective(flat, None if bias is None else bias.detach())
        weight.grad = of_weight + l2 * flat
        if bias is not None:
            bias.grad = of_bias
        return loss + 0.5 * l2 * float(flat.square().sum())

    optimizer.step(closure)
    for p in parameters:
        p.requires_grad_(False)


class _Objective:
    """Mean loss over the rows of all processes, with its gradients.

    Attributes:
        evaluations: How often it was computed.
    """

    def __init__(self, blocks: list[Tensor], targets: Tensor, problem: str, rows: int):
        self.rows, self.loss_of, self.evaluations = rows, _LOSSES[problem], 0
        self.parts = list(zip(blocks, targets.split([len(block) for block in blocks]), strict=True))

    @torch.no_grad()
    def __call__(self, weight: Tensor, bias: Tensor | None) -> tuple[float, Tensor, Tensor, float]:
        """Loss, gradients float64 [C, d] and [C], and right answers of a row, all of them means."""
        self.evaluations += 1
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        of_weight, of_bias, sums = torch.zeros_like(weight), torch.zeros_like(bias), weight.new_zeros(2)
        for block, block_targets in self.parts:
            w, b = weight.to(block.dtype), bias.to(block.dtype)
            chunk = max(1, _LOGITS // len(weight))
            for x, targets in zip(block.split(chunk), block_targets.split(chunk), strict=True):
                loss, gradient, right = self.loss_of(torch.addmm(b, x, w.mT), targets)
                sums += torch.stack([loss.double(), right.double()])
                of_weight += gradient.mT @ x
                of_bias += gradient.sum(0, dtype=torch.float64)
        flat = torch.cat([sums, of_bias, of_weight.flatten()])
        flat = torch.from_numpy(all_reduce(flat.cpu().numpy())).to(weight.device) / self.rows
        sums, of_bias, of_weight = flat.split([2, len(bias), weight.numel()])
        return float(sums[0]), of_weight.view_as(weight), of_bias, float(sums[1])


def _classes(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the cross-entropies, its gradient, right classes."""
    total = logits.logsumexp(1)
    right = (logits.argmax(1) == targets).sum()
    loss = (total - logits.gather(1, targets[:, None])[:, 0]).sum(dtype=torch.float64)
    gradient = (logits - total[:, None]).exp_()
    gradient.scatter_add_(1, targets[:, None], -torch.ones_like(total)[:, None])
    return loss, gradient, right


def _several_labels(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the binary cross-entropies, its gradient, right labels."""
    loss = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dtype=torch.float64)
    return loss, logits.sigmoid() - targets, ((logits > 0) == (targets > 0.5)).sum()


def _numbers(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the squared errors, its gradient, and nothing that could be right."""
    error = logits - targets
    return error.square().sum(dtype=torch.float64), 2 * error, logits.new_zeros(())


_LOSSES = {
    "single_label_classification": _classes,
    "multi_label_classification": _several_labels,
    "regression": _numbers,
}
