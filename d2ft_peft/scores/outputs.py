"""Scores of samples from the outputs of the forward pass that trained them.

| score | of a sample | source |
|---|---|---|
| ``loss`` | its loss; of a sequence the mean over its tokens | Loshchilov and Hutter, arXiv 1511.06343 |
| ``el2n`` | norm of softmax(logits) - onehot(label), which bounds its gradient | Paul et al., arXiv 2107.07075 |

Nothing here waits for a device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..partition import base_model


IGNORED = -100
"""Label of tokens that carry no loss, as everywhere in transformers."""


def live_score(score: str, model: nn.Module, logits: Tensor, labels: Tensor) -> np.ndarray:
    """Scores of the rows of a batch, float32 [n], not negative; see `score_outputs`. It waits for the device."""
    return score_outputs(score, model, logits, labels, len(logits)).cpu().numpy()


@torch.no_grad()
def score_outputs(
    score: str,
    model: nn.Module,
    logits: Tensor,
    labels: Tensor | None,
    samples: int,
    position_ids: Tensor | None = None,
    shift_labels: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> Tensor:
    """Score samples by the outputs of the forward pass that trained them.

    Args:
        score: ``"loss"`` or ``"el2n"``.
        model: The model: one with a causal loss predicts the next token's label.
        logits: [n, classes] or [n, tokens, classes].
        labels: Class indices [n] or [n, tokens]; or numbers in the shape of the logits (regression, several labels).
        samples: Number of samples in the batch.
        position_ids: Of a batch without padding, int [1, tokens]: a sample begins wherever they are 0.
        shift_labels: Class indices that are shifted already, [n, tokens]; they are read instead of `labels`.
        cu_seq_lens: Instead of `position_ids`: where samples begin and end, int [samples + 1].

    Returns:
        float32 [samples], not negative; on the logits' device. Of a batch without padding whose positions begin
        another number of times, minus that number and one throughout: whoever reads the values refuses them
        (`refuse_miscounted`), since only the device knows by now.

    Raises:
        ValueError: If the labels do not fit the logits in one of these ways, or rows are not samples.
    """
    causal = shift_labels is None and labels is not None and shifts_labels(model) and logits.ndim == 3
    labels = labels if shift_labels is None else shift_labels
    joined = len(logits) == 1 and samples > 1 and (position_ids is not None or cu_seq_lens is not None)
    found = len(logits) if not joined else samples if cu_seq_lens is None else len(cu_seq_lens) - 1
    if found != samples:
        raise _miscounted(score, found, samples)
    if labels.is_floating_point() and labels.numel() == logits.numel():
        return _against_numbers(score, logits.float(), labels)
    if labels.shape != logits.shape[:-1] or labels.is_floating_point():
        raise ValueError(
            f"score {score!r} needs labels that fit the logits {list(logits.shape)}; they have shape "
            f"{list(labels.shape)} and dtype {labels.dtype}. Choose policy='fewer_samples' or 'bilevel' for this model."
        )
    labels = labels.to(logits.device, non_blocking=True)
    begins = _begins(labels, position_ids, cu_seq_lens) if joined else None
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    values, counted = _against_classes(score, logits, labels)
    if joined:
        return _by_sequence(values[0], counted[0], begins, samples, causal)
    if values.ndim == 1:
        return torch.where(counted, values, 0.0)
    values, counted = values.flatten(1), counted.flatten(1)
    return torch.where(counted, values, 0.0).sum(1) / counted.sum(1).clamp(min=1)


def refuse_miscounted(score: str, values: np.ndarray) -> None:
    """Raises ValueError if `score_outputs` found another number of sequences than of samples; values float [n]."""
    if len(values) and values[0] < 0:
        raise _miscounted(score, int(-values[0]) - 1, len(values))


def _miscounted(score: str, found: int, samples: int) -> ValueError:
    return ValueError(
        f"score {score!r}: {found} values of {samples} samples (indices); each sample needs one. Use a collator with "
        "one sample a row; of a batch without padding give its position_ids, or cu_seq_lens. Rows into which several "
        "samples are packed have no score of a sample: choose policy='fewer_samples'."
    )


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's loss compares a token's logits with the next token's label, by the rule of the Trainer."""
    model = base_model(model)
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss and not encoder_decoder


def _against_classes(score: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of tokens, and which of them carry a loss."""
    logits = logits.float()
    target = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    total = logits.logsumexp(-1)
    if score == "loss":
        # A probability of one rounds to either side.
        values = (total - target).clamp(min=0)
    else:
        squares = ((2 * logits).logsumexp(-1) - 2 * total).exp()
        values = (squares - 2 * (target - total).exp() + 1).clamp(min=0).sqrt()
    return values, labels != IGNORED


def _begins(labels: Tensor, position_ids: Tensor | None, cu_seq_lens: Tensor | None) -> Tensor:
    """Where samples begin among the tokens of a batch without padding; bool [tokens]."""
    if position_ids is not None:
        return position_ids.to(labels.device, non_blocking=True).reshape(-1) == 0
    begins = torch.zeros(labels.shape[1] + 1, dtype=torch.bool, device=labels.device)
    return begins.index_fill(0, cu_seq_lens.to(labels.device, non_blocking=True)[:-1].long(), True)[:-1]


def _by_sequence(values: Tensor, counted: Tensor, begins: Tensor, samples: int, causal: bool) -> Tensor:
    """Means over the tokens of each of several sequences in a row."""
    sequence = begins.long().cumsum(0) - 1
    found = sequence[-1] + 1
    if causal:  # the target is the next token; the first of a sequence is no target of the one before it
        sequence, counted = sequence[1:], counted & ~begins[1:]
    sequence = sequence.clamp(0, samples)
    sums = values.new_zeros(2, samples + 1)
    sums.index_add_(1, sequence, torch.stack([torch.where(counted, values, 0.0), counted.to(values.dtype)]))
    means = sums[0] / sums[1].clamp(min=1)
    return torch.where(found == samples, means[:samples], -(found + 1).to(means.dtype))


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
