"""Samples one after the other in a single row, without padding, where a model's attention keeps them apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import DataCollatorWithFlattening

from ..costs import inference
from ..partition import base_model
from ..scores import shifts_labels


_KEYS = {"input_ids", "labels", "attention_mask"}


class Flattening:
    """Collates samples of a causal language model into one row, ``position_ids`` of which restart at every sample.

    Whether attention keeps them apart is tried on the model at the first batch.

    Args:
        model: The model.

    Raises:
        ValueError: If the model predicts no next tokens.
    """

    def __init__(self, model: nn.Module):
        if not shifts_labels(model):
            raise ValueError(
                f"padding='flatten' puts samples of causal language models into one row, and {type(model).__name__} is "
                "none; choose padding='compose'."
            )
        self.model, self._collate, self._tried = model, DataCollatorWithFlattening(), False

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        """One row of tokens, labels and positions; the first label of a sample, which nothing predicts, is ignored.

        Raises:
            ValueError: If items hold something else, or attention mixes samples.
        """
        for item in items:
            if not isinstance(item, Mapping) or not {"input_ids"} <= item.keys() <= _KEYS:
                raise ValueError(
                    f"padding='flatten' takes items with input_ids and labels, and one has {sorted(item)}; choose "
                    "padding='compose'."
                )
        if not self._tried:
            self._try([item for item in items if len(item["input_ids"]) > 1][:2] or items)
            self._tried = True
        return self._collate([{key: item[key] for key in ("input_ids", "labels") if key in item} for item in items])

    @torch.no_grad()
    def _try(self, items: list[Any]) -> None:
        """Run some samples in one row, and each alone.

        Raises:
            ValueError: If their logits differ.
        """
        if len(items) == 1:
            items = items * 2
        device = next(self.model.parameters()).device
        rows = [torch.as_tensor(np.asarray(item["input_ids"]))[None] for item in items]
        together = self._collate([{"input_ids": row[0]} for row in rows])
        together.pop("labels")
        with inference(self.model):
            joined = base_model(self.model)(**send_to_device(together, device)).logits[0]
            alone = torch.cat([base_model(self.model)(input_ids=row.to(device)).logits[0] for row in rows])
        # Norms and softmax compute in float32 whatever the model's type.
        eps = max(torch.finfo(kind).eps for kind in (joined.dtype, torch.float32))
        tolerance = 100 * eps * float(alone.abs().max())
        if not torch.allclose(joined, alone, rtol=0, atol=tolerance):
            raise ValueError(
                f"padding='flatten': the attention of {type(base_model(self.model)).__name__} does not keep samples in "
                "one row apart by their position_ids; choose padding='compose'."
            )
