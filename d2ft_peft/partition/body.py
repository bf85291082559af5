"""The part of a model around its blocks, and what it was called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .gauges import Gauge
from .partition import Partition


def find_body(model: nn.Module, stack: str) -> PreTrainedModel:
    """The innermost model around a stack that embeds its inputs itself: of mask and positions it makes what blocks get.

    Models with a head do not always call `base_model`, but one that is within it.

    Raises:
        ValueError: If there is none.
    """
    body = next((module for module in _models_around(model, stack) if _embeds(module)), None)
    if body is None:
        raise ValueError(
            f"{type(model).__name__} has no transformers model around {stack!r} that embeds its inputs itself, so that "
            "what its blocks are called with is not known; leave cache_frozen out."
        )
    return body


def reads_token_ids(model: nn.Module, partition: Partition, gauge: Gauge) -> bool:
    """Whether the rows at a gauge are as many as token ids, rather than patches or frames.

    Rows that cross attention reads are those of the stack before, or of whatever the model begins with.
    """
    earlier = partition.stacks[gauge.stack - 1] if gauge.other and gauge.stack else None
    if gauge.other and earlier is None:
        return _takes_token_ids(model)
    stack = (earlier or partition.stacks[gauge.stack]).name
    return _takes_token_ids(next(_models_around(model, stack), model))


def attention_kernel(model: nn.Module, path: str) -> str:
    """The attention implementation of what stands at a path: parts of a model may have others than the whole."""
    return getattr(next(_models_around(model, path), model).config, "_attn_implementation", None) or ""


def _models_around(model: nn.Module, path: str) -> Iterator[PreTrainedModel]:
    """The transformers models around what stands at a path, from the innermost to the outermost."""
    parts = path.split(".")
    around = (model.get_submodule(".".join(parts[:count])) for count in range(len(parts) - 1, -1, -1))
    return (module for module in around if isinstance(module, PreTrainedModel))


def _takes_token_ids(module: nn.Module) -> bool:
    return "input_ids" in inspect.signature(type(module).forward).parameters


def _embeds(module: nn.Module) -> bool:
    return not {"input_ids", "pixel_values"}.isdisjoint(inspect.signature(module.forward).parameters)


def bound_arguments(forward: Callable, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those in ``**kwargs`` included."""
    bound = inspect.signature(forward).bind_partial(*args, **kwargs)
    found = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found.update(found.pop(name, {}))
    return found
