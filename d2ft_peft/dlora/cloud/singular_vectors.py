"""Directions of a weight's largest singular values, the same ones whenever and wherever they are computed."""

from __future__ import annotations

import torch
from torch import Tensor


_WHOLE = 1024
"""Up to this width the whole decomposition is computed: it is exact, and takes a second."""
_MORE, _ITERATIONS = 16, 6


@torch.no_grad()
def leading_directions(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Left [out, rank] and right [in, rank] singular vectors of a weight [out, in], in float64.

    Of wide weights by subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4), whose start is always the
    same. Each pair has the sign that makes the largest number of its right vector positive.
    """
    weight = weight.double()
    if min(weight.shape) <= _WHOLE:
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        left, right = left[:, :rank], right[:rank].T
    else:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(weight.shape[1], rank + _MORE, generator=generator, dtype=weight.dtype)
        basis = torch.linalg.qr(weight @ start.to(weight.device)).Q
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
        inner, _, right = torch.linalg.svd(basis.T @ weight, full_matrices=False)
        left, right = (basis @ inner)[:, :rank], right[:rank].T
    signs = right.gather(0, right.abs().argmax(0, keepdim=True)).sign()
    return left * signs, right * signs
