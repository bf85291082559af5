"""Hidden states of single samples on their way to a disk and back: their bytes, their names, their padding."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def content_key(about: str, hidden: Tensor, real: Tensor, positions: Tensor | None) -> bytes:
    """A name for what follows from a sample's hidden states, 20 bytes: equal content has equal names.

    Args:
        about: What it depends on besides.
        hidden: Hidden states [tokens, width].
        real: Which of the tokens are no padding, bool [tokens]; the others do not count.
        positions: Positions of the tokens [tokens], or None.
    """
    digest = hashlib.blake2b(f"{about} {hidden.dtype}".encode(), digest_size=20)
    digest.update(bytes_of(hidden[real]))
    if positions is not None:
        digest.update(bytes_of(positions[real]))
    return digest.digest()


def with_padding(values: Tensor, real: Tensor) -> Tensor:
    """Hidden states [tokens, ...] of a sample from those of its real tokens; zeros at its padding."""
    whole = values.new_zeros(real.shape[0], *values.shape[1:])
    whole[real] = values
    return whole
