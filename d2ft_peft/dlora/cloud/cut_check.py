"""Whether a model's blocks can be run from hidden states, mask and positions alone: it is tried, not looked up."""

from __future__ import annotations

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
    whole = base.copy()
    try:
        with torch.no_grad():
            hidden, expected, _ = _observed(base, whole, _example(base))
        hidden.requires_grad_()
        with torch.enable_grad():
            _, found, returned = _observed(base, model, base.dummy_inputs(hidden), hidden)
        _cut(base, whole, type(returned) is tuple)
        with torch.no_grad():
            _observed(base, whole, base.dummy_inputs(hidden), hidden)
    except Exception as error:
        raise ValueError(
            f"{name} does not run from hidden states alone ({type(error).__name__}: {str(error)[:200]}); DLoRA cannot "
            "cut it."
        ) from error
    parts = returned if type(returned) is tuple else (returned,)
    if not isinstance(parts[0], Tensor) or any(part is not None for part in parts[1:]):
        raise ValueError(f"blocks of {name} hand on more than hidden states; DLoRA cannot cut it.")
    rounding = torch.finfo(base.dtype).eps ** 0.5
    if (found - expected).norm() > rounding * expected.norm():
        raise ValueError(f"blocks of {name} read more than hidden states, mask and positions; DLoRA cannot cut it.")
    return hidden, type(returned) is tuple


def _cut(base: BaseModel, model: nn.Module, returns_tuple: bool) -> None:
    """Leave a copy the uppermost block alone."""
    blocks = model.get_submodule(base.stack)
    for index, block in enumerate(blocks[:-1]):
        blocks[index] = Passage(index, returns_tuple, plain_facts(block))


def _has_recurrence(base: BaseModel) -> bool:
    layers = DynamicCache(config=base.model.config).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def _example(base: BaseModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if base.takes_pixels:
        return {"pixel_values": torch.randn(base.pixels, generator=generator).to(base.model.device, base.dtype)}
    vocabulary = base.model.config.get_text_config().vocab_size
    return {"input_ids": torch.randint(vocabulary, (1, _TOKENS), generator=generator).to(base.model.device)}


def _observed(
    base: BaseModel, model: nn.Module, inputs: dict[str, Tensor], hidden: Tensor | None = None
) -> tuple[Tensor, Tensor, Any]:
    """Hidden states before the blocks and after them, and what the last block returned."""
    blocks, seen = model.get_submodule(base.stack), {}

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        seen["hidden"] = args[0] if args else kwargs["hidden_states"]
        if hidden is None:
            return None
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handles = [
        blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
        blocks[-1].register_forward_hook(lambda module, args, out: seen.update(returned=out)),
    ]
    base.body(model)(**inputs)
    for handle in handles:
        handle.remove()
    returned = seen["returned"]
    return seen["hidden"].detach().clone(), (returned[0] if type(returned) is tuple else returned), returned
