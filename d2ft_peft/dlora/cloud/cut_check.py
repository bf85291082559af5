"""Whether a model's blocks can be run from hidden states, mask and positions alone: it is tried, not looked up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

from ..blocks import Passage, plain_facts


if TYPE_CHECKING:
    from .base_model import BaseModel


_TOKENS = 8


def check_cut(base: BaseModel, model: nn.Module) -> tuple[Tensor, bool]:
    """Run a model whole, and once more from the hidden states before its blocks: the outputs have to be the same.

    Args:
        base: The base model.
        model: A copy of it; what is hooked there sees the second pass only, with gradients.

    Returns:
        Hidden states before the blocks [1, tokens, width]; whether a block returns a tuple.

    Raises:
        ValueError: If blocks read, or hand on, more than hidden states, or remember otherwise than in keys and values.
    """
    name = type(base.model).__name__
    if _has_recurrence(base):
        raise ValueError(f"{name} has recurrent blocks, which remember more than keys and values; DLoRA cannot cut it.")
    middle, upper = base.depth // 2, base.copy()
    try:
        with torch.no_grad():
            first = _observed(base, base.copy(), _example(base), middle)
        first.before.requires_grad_()
        with torch.enable_grad():
            again = _observed(base, model, base.dummy_inputs(first.before), middle, first.before)
        _leave_out(base, upper, middle, again.is_tuple)
        with torch.no_grad():
            half = _observed(base, upper, base.dummy_inputs(first.between), middle, first.between)
    except Exception as error:
        raise ValueError(
            f"{name} does not run from hidden states alone ({type(error).__name__}: {str(error)[:200]}); DLoRA cannot "
            "cut it."
        ) from error
    for found, what in ((again, "read more than hidden states, mask and positions"), (half, "hand on more than those")):
        if (found.after - first.after).norm() > torch.finfo(base.dtype).eps ** 0.5 * first.after.norm():
            raise ValueError(f"blocks of {name} {what}; DLoRA cannot cut it.")
    return first.before, again.is_tuple


def _leave_out(base: BaseModel, model: nn.Module, below: int, returns_tuple: bool) -> None:
    """Leave a copy its upper blocks only."""
    blocks = model.get_submodule(base.stack)
    for index in range(below):
        blocks[index] = Passage(index, returns_tuple, plain_facts(blocks[index]))


def _has_recurrence(base: BaseModel) -> bool:
    layers = DynamicCache(config=base.model.config).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def _example(base: BaseModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if base.takes_pixels:
        return {"pixel_values": torch.randn(base.pixels, generator=generator).to(base.model.device, base.dtype)}
    vocabulary = base.model.config.get_text_config().vocab_size
    return {"input_ids": torch.randint(vocabulary, (1, _TOKENS), generator=generator).to(base.model.device)}


@dataclass
class _Observed:
    """Hidden states before the blocks, before the middle one and after all; whether they came in a tuple."""

    before: Tensor | None = None
    between: Tensor | None = None
    after: Tensor | None = None
    is_tuple: bool = False


def _observed(
    base: BaseModel, model: nn.Module, inputs: dict[str, Tensor], middle: int, hidden: Tensor | None = None
) -> _Observed:
    """Run a model, with `hidden` before its blocks if it is given."""
    blocks, seen = model.get_submodule(base.stack), _Observed()

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        seen.before = (args[0] if args else kwargs["hidden_states"]).detach().clone()
        if hidden is None:
            return None
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def between(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.between = (args[0] if args else kwargs["hidden_states"]).detach().clone()

    def leave(module: nn.Module, args: tuple, out: Any) -> None:
        seen.is_tuple = type(out) is tuple
        seen.after = out[0] if seen.is_tuple else out

    handles = [
        blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
        blocks[middle].register_forward_pre_hook(between, with_kwargs=True),
        blocks[-1].register_forward_hook(leave),
    ]
    base.body(model)(**inputs)
    for handle in handles:
        handle.remove()
    return seen
