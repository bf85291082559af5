"""Scores of samples that follow training: what the last visit of a sample showed, at no extra pass.

| score | of a sample | source |
|---|---|---|
| ``loss`` | its loss; of a sequence the mean over its tokens | Loshchilov and Hutter, arXiv 1511.06343 |
| ``el2n`` | norm of softmax(logits) - onehot(label), which bounds its gradient | Paul et al., arXiv 2107.07075 |
"""

from __future__ import annotations

import os

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


IGNORED = -100
"""Label of tokens that carry no loss, as everywhere in transformers."""


class LiveScores:
    """The last-seen score of every sample.

    Attributes:
        score: Name of the score.
        values: float32 [samples known so far]; NaN where a sample was not visited yet.
    """

    def __init__(self, score: str):
        self.score = score
        self.values = np.empty(0, dtype=np.float32)

    def update(self, indices: np.ndarray, values: np.ndarray) -> None:
        """Take over the scores [n] of samples [n] that were just visited."""
        if len(indices) and indices.max() >= len(self.values):
            grown = np.full(max(indices.max() + 1, 2 * len(self.values)), np.nan, dtype=np.float32)
            grown[: len(self.values)] = self.values
            self.values = grown
        self.values[indices] = values

    def lookup(self, indices: np.ndarray) -> np.ndarray:
        """Scores of samples, float32 [n]; one that was not visited gets the mean of these that were, or 1."""
        values = np.full(len(indices), np.nan, dtype=np.float32)
        known = indices < len(self.values)
        values[known] = self.values[indices[known]]
        unseen = np.isnan(values)
        values[unseen] = 1.0 if unseen.all() else values[~unseen].mean()
        return values

    def save(self, path: str | os.PathLike) -> None:
        """Write the scores as safetensors."""
        save_file({"values": self.values}, path)

    def load(self, path: str | os.PathLike) -> None:
        """Read scores back."""
        self.values = load_file(path)["values"]


@torch.no_grad()
def live_score(score: str, model: nn.Module, logits: Tensor, labels: Tensor) -> np.ndarray:
    """Score samples by the outputs of the forward pass that trained them.

    Args:
        score: ``"loss"`` or ``"el2n"``.
        model: The base model: a causal language model predicts the next token's label.
        logits: [n, classes] or [n, tokens, classes].
        labels: Class indices [n] or [n, tokens]; or numbers in the shape of the logits (regression, several labels).

    Returns:
        float32 [n], not negative.

    Raises:
        ValueError: If the labels do not fit the logits in one of these ways.
    """
    logits = logits.float()
    if labels.is_floating_point() and labels.numel() == logits.numel():
        return _against_numbers(score, logits, labels).cpu().numpy()
    if labels.shape != logits.shape[:-1] or labels.is_floating_point():
        raise ValueError(
            f"score {score!r} needs labels that fit the logits {list(logits.shape)}; they have shape "
            f"{list(labels.shape)} and dtype {labels.dtype}. Choose policy='fewer_samples' or 'bilevel' for this model."
        )
    if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and logits.ndim == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    targets = labels.clamp(min=0).to(logits.device)
    log_p = logits.log_softmax(-1)
    log_p_target = log_p.gather(-1, targets[..., None])[..., 0]
    if score == "loss":
        values = -log_p_target
    else:
        values = (log_p.exp().square().sum(-1) - 2 * log_p_target.exp() + 1).clamp(min=0).sqrt()
    if values.ndim == 2:
        counted = counted.to(values.device)
        values = (values * counted).sum(1) / counted.sum(1).clamp(min=1)
    return values.cpu().numpy()


def _against_numbers(score: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Regression (one output) by squared error, several labels at a time by the binary cross-entropy."""
    n = len(logits)
    logits, labels = logits.reshape(n, -1), labels.reshape(n, -1).to(logits)
    several = logits.shape[1] > 1
    if score == "el2n":
        return ((logits.sigmoid() if several else logits) - labels).norm(dim=1)
    if several:
        return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
    return (logits - labels).square()[:, 0]
