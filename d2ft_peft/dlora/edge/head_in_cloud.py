"""A causal language model whose norm, head and loss are the cloud's: the edge sends labels, and gets a loss."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...partition.body import bound_arguments
from .remote_span import Head, RemoteSpan


_PREDICTED_FROM = 1
"""A token is predicted from the one before it, so the first label of a row is nobody's."""


class LogitsInCloud:
    """In the place of logits that did not come back: not None, for which an evaluation would leave its metrics out."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"logits have no {name!r} here: with the head in the cloud a pass with labels brings back its loss alone; "
            "for metrics of predictions use head='edge', or leave the labels out."
        )


class HeadInCloud:
    """Stands before the forward of a model.

    Args:
        model: The causal language model.
        remote: Its span, which ends with the head.
    """

    def __init__(self, model: nn.Module, remote: RemoteSpan):
        self.model, self.remote = model, remote
        self._vocabulary = model.config.get_text_config().vocab_size
        self.__signature__ = inspect.signature(model.forward)  # by which the Trainer chooses columns and labels

    def install(self) -> None:
        """Take the place of the model's forward."""
        self.model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        """The model's own arguments; the loss where there are labels, logits of the last tokens otherwise."""
        given = bound_arguments(type(self.model).forward, (self.model, *args), kwargs)
        given.pop("self")
        if self.model.config.get_text_config().vocab_size != self._vocabulary:
            raise ValueError("the vocabulary was resized, and the head in the cloud was not; use head='edge'.")
        labels, items = given.pop("labels", None), given.pop("num_items_in_batch", None)
        keep = given.pop("logits_to_keep", 0)
        if isinstance(keep, Tensor):
            raise ValueError("logits_to_keep is a tensor; with the head in the cloud give the number of last tokens.")
        head = self.remote.head = Head(labels, _items(labels, items), keep)
        try:
            body = (self.remote.body if self.model.base_model is self.model else self.model.base_model)(**given)
        finally:
            self.remote.head = None
        loss, logits = (head.out, LogitsInCloud()) if labels is not None else (None, head.out)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=body.past_key_values)


def _items(labels: Tensor | None, items: Any) -> float:
    """What the summed loss is divided by: the model's own rule, over the whole batch."""
    if items is not None:
        return float(items * 1)  # computed with, as the loss does that the cloud computes: some look whether it is
    if labels is None:
        return 1.0
    return float(torch.count_nonzero(labels[:, _PREDICTED_FROM:] != -100).clamp(min=1))
