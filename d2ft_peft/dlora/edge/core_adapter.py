"""Crossing at rank r: A and B are frozen and public, and the edge trains a core of r x r between them.

LoRA-XS (arXiv 2405.17604) has the parametrization, PrivateLoRA (arXiv 2311.14030) the placement. Of each token and
module r numbers cross in each direction, instead of a hidden state.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F


class CoreB(nn.Module):
    """In the place of a LoRA layer's B: the frozen factor times a trained core.

    On disk it is what stands in its place there, B [out, r] of a plain LoRA adapter.

    Args:
        factor: Frozen factor [out, r], its columns orthogonal and of one length.
    """

    def __init__(self, factor: Tensor):
        super().__init__()
        self.register_buffer("factor", factor, persistent=False)
        self.core = nn.Parameter(factor.new_zeros(factor.shape[1], factor.shape[1]))

    @property
    def weight(self) -> Tensor:
        """B of the LoRA adapter that this is."""
        return self.factor @ self.core

    def narrow(self, u: Tensor) -> Tensor:
        """The core times what A made of the input [..., r]."""
        return F.linear(u, self.core)

    def forward(self, u: Tensor) -> Tensor:
        """B times what A made of the input: [..., r] to [..., out]."""
        return F.linear(self.narrow(u), self.factor)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        missing = args[2]
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            missing.append(prefix + "weight")
            return
        with torch.no_grad():  # the factor's columns are orthogonal: this is the core, but for rounding
            self.core.copy_(self.factor.T @ weight.to(self.factor) / self.factor.square().sum(0)[:, None])


class FrozenA(nn.Module):
    """In the place of a LoRA layer's A: the same projection, without a parameter.

    Args:
        factor: Frozen factor [r, in], its rows orthonormal.
    """

    def __init__(self, factor: Tensor):
        super().__init__()
        self.register_buffer("weight", factor)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., r]."""
        return F.linear(x, self.weight)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and not is_alike(weight, self.weight):
            raise ValueError(
                f"{prefix}weight of the adapter is another one than the frozen factor in the cloud: a core can go on "
                "from what was trained as a core of the same rank on the same base model; use crossing='hidden'."
            )


def is_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two factors are the same but for what another machine rounds otherwise."""
    return one.shape == other.shape and torch.allclose(one.to(other), other, rtol=1e-3, atol=1e-4)


def make_core(layer: LoraLayer, adapter: str, a: Tensor, b: Tensor) -> None:
    """Let a LoRA layer train a core between frozen factors.

    Args:
        layer: The layer.
        adapter: Which of its adapters.
        a: A [r, in].
        b: B [out, r].
    """
    like = layer.lora_A[adapter].weight
    layer.lora_A[adapter] = FrozenA(a.to(like.device, like.dtype))
    layer.lora_B[adapter] = CoreB(b.to(like.device, like.dtype))
