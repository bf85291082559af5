"""How hidden states and gradients are packed while they cross.

``int8`` has a scale of its own for every token (the last axis), taken from that token: a scale for a whole tensor, or
one that was measured beforehand, costs accuracy, since a few tokens are far larger than the rest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...hidden_states import bytes_of


PACKINGS = ("none", "bf16", "int8")
"""As it is; rounded to bfloat16; eight bits and a float32 scale per token."""


def pack(tensor: Tensor, packing: str) -> list[memoryview]:
    """The bytes of a tensor, in pieces.

    Args:
        tensor: Any tensor; floating-point with two axes or more, if it is packed.
        packing: One of `PACKINGS`.
    """
    if packing == "none":
        return [bytes_of(tensor)]
    if packing == "bf16":
        return [bytes_of(tensor.to(torch.bfloat16))]
    values = tensor.to(torch.float32)
    scale = values.abs().amax(-1, keepdim=True) / 127 if values.shape[-1] else values.sum(-1, keepdim=True)
    # A token of zeros has scale zero. NaN and infinity reach the scale, and come out as NaN on the other side.
    whole = (values / scale).round_().nan_to_num_(0.0).to(torch.int8)
    return [bytes_of(whole), bytes_of(scale)]


def packed_bytes(shape: tuple[int, ...], dtype: torch.dtype, packing: str) -> int:
    """How many bytes a tensor takes."""
    numel = math.prod(shape)
    if packing == "none":
        return numel * dtype.itemsize
    return 2 * numel if packing == "bf16" else numel + 4 * math.prod(shape[:-1])


def unpack(data: memoryview, shape: tuple[int, ...], dtype: torch.dtype, packing: str) -> Tensor:
    """The tensor that `packed_bytes` bytes hold; a view of them where they are neither packed nor misaligned."""
    if packing == "none":
        return _tensor(data, dtype, shape)
    if packing == "bf16":
        return _tensor(data, torch.bfloat16, shape).to(dtype)
    numel = math.prod(shape)
    scale = _tensor(data[numel:], torch.float32, (*shape[:-1], 1))
    return (_tensor(data[:numel], torch.int8, shape).to(torch.float32) * scale).to(dtype)


def _tensor(data: memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    if dtype is torch.bool:  # bytes other than 0 and 1 are no booleans, and kernels trust them to be
        return torch.frombuffer(data, dtype=torch.uint8).reshape(shape) != 0
    aligned = torch.frombuffer(data, dtype=torch.uint8)
    if aligned.data_ptr() % dtype.itemsize:
        aligned = aligned.clone()
    return aligned.view(dtype).reshape(shape)
