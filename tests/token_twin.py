"""The slow, obvious twin of blocks that run on chosen tokens: a plain model, sample by sample, by plain indexing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def token_twin(blocks: Sequence[nn.Module], chosen: dict[int, Tensor]) -> Iterator[None]:
    """Let a plain model run some of its blocks on chosen tokens.

    Args:
        blocks: Its blocks.
        chosen: Positions of the tokens that pass a block, int [B, K], by the index of the block.
    """
    for index, positions in chosen.items():
        blocks[index].forward = _by_sample(blocks[index], positions)
    try:
        yield
    finally:
        for index in chosen:
            del blocks[index].forward


def _by_sample(block: nn.Module, positions: Tensor):
    def forward(hidden_states: Tensor, *args, **kwargs) -> Tensor:
        rows = []
        for sample, own in enumerate(positions.tolist()):
            hidden = hidden_states[sample : sample + 1]
            taken = [_of(value, sample, own, hidden.shape[1]) for value in args]
            named = {name: _of(value, sample, own, hidden.shape[1]) for name, value in kwargs.items()}
            out = type(block).forward(block, hidden[:, own], *taken, **named)
            place = {position: i for i, position in enumerate(own)}
            tokens = range(hidden.shape[1])
            rows.append(torch.stack([out[0, place[t]] if t in place else hidden[0, t] for t in tokens]))
        return torch.stack(rows)

    return forward


def _of(value, sample: int, own: list[int], tokens: int):
    """One sample's part of an argument, at its own tokens."""
    if isinstance(value, tuple):
        return tuple(_of(part, sample, own, tokens) for part in value)
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    value = value[sample : sample + 1] if len(value) > 1 else value
    if value.ndim == 4:  # a mask over pairs
        value = value[:, :, own] if value.shape[2] == tokens else value
        return value[:, :, :, own]
    return value[:, own]
