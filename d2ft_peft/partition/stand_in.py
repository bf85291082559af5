"""Stand-ins for the modules of a block: its own code, with random weights of rank 4 in float64 for its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from .branches import unwrap


_RANK = 4
_LARGEST = 2**24
"""Most entries of a parameter that is no projection's; a block with larger ones is not tried."""


class CannotBeCut(Exception):
    """What stands in the way."""


class StandIn(nn.Module):
    """Stands for a linear layer.

    Attributes:
        down: [_RANK, in_features].
        up: [out_features, _RANK].
        bias: [out_features].
        instead: What a trial lets it compute instead of the whole layer, or None.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.down = torch.randn(_RANK, in_features, dtype=torch.float64) / in_features**0.5
        self.up = torch.randn(out_features, _RANK, dtype=torch.float64) / _RANK**0.5
        self.bias = torch.randn(out_features, dtype=torch.float64)
        self.instead: Callable[[StandIn, Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x) if self.instead is None else self.instead(self, x)

    def whole(self, x: Tensor) -> Tensor:
        """What the layer computes."""
        return x @ self.down.T @ self.up.T + self.bias


def stand_in_for(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    """A module like this one with random weights in float64, and nothing that was put before its forward."""
    module = unwrap(module)
    if id(module) in known:
        return known[id(module)]
    if isinstance(module, nn.Linear):
        return known.setdefault(id(module), StandIn(module.in_features, module.out_features))
    if isinstance(module, Conv1D):
        return known.setdefault(id(module), StandIn(module.nx, module.nf))
    stand = object.__new__(type(module))
    state = {name: value for name, value in vars(module).items() if name not in ("forward", "_old_forward")}
    stand.__dict__.update({**state, **vars(nn.Module())})
    known[id(module)] = stand
    if "gradient_checkpointing" in state:
        stand.gradient_checkpointing = False
    if isinstance(state.get("config"), PreTrainedConfig):
        config = stand.config = object.__new__(type(state["config"]))
        config.__dict__.update(vars(state["config"]))
        config._attn_implementation_internal = "eager"
    for name, parameter in module._parameters.items():
        stand._parameters[name] = None if parameter is None else _random(name, parameter)
    for name, buffer in module._buffers.items():
        stand._buffers[name] = None if buffer is None else _known(buffer)
    for name, child in module._modules.items():
        stand._modules[name] = None if child is None else stand_in_for(child, known)
    return stand


def _random(name: str, parameter: Tensor) -> nn.Parameter:
    if parameter.numel() > _LARGEST:
        raise CannotBeCut(f"its parameter {name!r} of {parameter.numel():,} entries is too large to be tried")
    return nn.Parameter(torch.randn(parameter.shape, dtype=torch.float64), requires_grad=False)


def _known(buffer: Tensor) -> Tensor:
    moved = torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer.detach().cpu()
    return moved.double() if moved.is_floating_point() else moved
