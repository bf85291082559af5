"""The Trainer out of the box, with what `lossless.py` has to know of its run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from accuracy import PlainEvaluation
from transformers import Trainer

from d2ft_peft.costs import flop_counter


class StockTrainer(PlainEvaluation, Trainer):
    """The Trainer out of the box, which notes the batches that it saw."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.samples: dict[int, dict] = {}  # one of each length
        self.counts, self.real = Counter(), 0

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        ids = inputs["input_ids"] if "input_ids" in inputs else inputs["pixel_values"]
        if ids.shape[1] not in self.samples:
            one = {name: v[:1].clone() if torch.is_tensor(v) else v for name, v in inputs.items()}
            self.samples[ids.shape[1]] = one
        self.counts[ids.shape[1]] += len(ids)
        self.real += int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else ids.shape[1] * len(ids)
        return 0.0

    @property
    def padding(self) -> float:
        """Share of the tokens that were padding."""
        return 1 - self.real / sum(length * count for length, count in self.counts.items())

    def flops(self) -> float:
        """FLOPs of all passes: those of a sample are a polynomial of its length, exactly, of degree two."""
        lengths = sorted(self.samples)
        if len(lengths) > 3:
            lengths = [lengths[0], lengths[len(lengths) // 2], lengths[-1]]
        found = []
        for length in lengths:
            with flop_counter() as counter:
                self.model(**self.samples[length]).loss.backward()
            found.append(counter.get_total_flops())
        polynomial = np.polyfit(lengths, found, len(lengths) - 1)
        return float(sum(count * np.polyval(polynomial, length) for length, count in self.counts.items()))


def figures(trainer: Trainer) -> dict[str, Any]:
    """FLOPs of a run, and what D2FT logged last under each of its names; of a stock Trainer, the share of padding."""
    if isinstance(trainer, StockTrainer):
        return {"flops": trainer.flops(), "logged": {"padding": trainer.padding}}
    usual = ("loss", "grad_norm", "learning_rate", "epoch", "step", "total_flos", "train_", "eval_")
    last = {name: figure for entry in trainer.state.log_history for name, figure in entry.items()}
    logged = {name: figure for name, figure in last.items() if not name.startswith(usual)}
    return {"flops": trainer.state.total_flos, "logged": logged}
