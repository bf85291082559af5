"""The stack of blocks of a model, and what stands in for those that the other side owns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache


def find_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and blocks of the one stack of a transformers model.

    Raises:
        ValueError: If there is none, or more than one: the model cannot be cut between edge and cloud.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    depth = getattr(config, "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and next(module.parameters(), None) is not None
    ]
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} has an encoder and a decoder; DLoRA cuts models with one stack.")
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} stacks of {depth} blocks "
            f"({', '.join(name for name, _ in found) or 'none'}); DLoRA cuts models with exactly one."
        )
    return found[0]


def plain_facts(block: nn.Module) -> dict[str, Any]:
    """What is said of a block beside its modules and weights: models look at it between their blocks."""
    return {
        name: value
        for name, value in vars(block).items()
        if name not in _OF_EVERY_MODULE and type(value) in (str, int, float, bool, type(None))
    }


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def check_span(edge_blocks: tuple[int, int], depth: int) -> range:
    """Indices of the blocks that the cloud owns.

    Raises:
        ValueError: If the edge owns all of them, or more.
    """
    below, above = edge_blocks
    if any(type(count) is not int or count < 0 for count in edge_blocks) or below + above >= depth:
        raise ValueError(
            f"edge_blocks={list(edge_blocks)!r} are the numbers of the lowest and of the uppermost blocks "
            f"that the edge owns, of {depth}; at least one has to be left for the cloud."
        )
    return range(below, depth - above)


class Passage(nn.Module):
    """Takes the place of a block that runs on the other side: hidden states pass.

    A key/value cache is told the length all the same, since masks and positions are made from it. What is written there
    is the number of each row, so that whoever reorders, repeats or crops the cache leaves a trace of what was done.

    Args:
        index: Index of the block.
        returns_tuple: Whether the blocks of this model return a tuple.
        facts: See `plain_facts`.
    """

    def __init__(self, index: int, returns_tuple: bool = False, facts: dict[str, Any] | None = None):
        super().__init__()
        self.__dict__.update(facts or {})
        self.index, self.returns_tuple = index, returns_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hidden states [batch, tokens, width], as they are."""
        cache = find_cache(args, kwargs)
        if cache is not None:
            write_rows(cache, self.index, hidden_states.shape[0], hidden_states.shape[1])
        return (hidden_states,) if self.returns_tuple else hidden_states


def find_cache(args: tuple, kwargs: dict[str, Any]) -> Cache | None:
    """The key/value cache among the arguments of a block."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def write_rows(cache: Cache, index: int, rows: int, tokens: int) -> None:
    """Count `tokens` more tokens of each row in a layer of the cache, and number the rows anew."""
    numbers = torch.arange(rows, dtype=torch.float32).view(rows, 1, 1, 1).expand(rows, 1, tokens, 1)
    cache.update(numbers, numbers, index)
    keys = cache.layers[index].keys
    keys.copy_(torch.arange(keys.shape[0], dtype=keys.dtype).view(-1, 1, 1, 1).expand_as(keys))


def read_rows(cache: Cache, index: int) -> list[int]:
    """Which row of the last pass each row of the cache was."""
    return [int(number) for number in cache.layers[index].keys[:, 0, -1, 0]]
