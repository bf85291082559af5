"""The adapters of the span's projections: they live on the edge, and answer when the cloud asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..wire.messages import Message, WireError
from .core_adapter import CoreB


KILLED = ("cloud_copy", "drop", "exchange")
"""What becomes of a killed module that has learned something: a frozen copy in the cloud, nothing, or an exchange."""


@dataclass(frozen=True)
class Alive:
    """Which adapters take part in a pass, by path of their projection.

    Attributes:
        trained: Those that get gradients.
        exchanged: Those that the cloud asks for; the trained ones and, in some settings, others.
        copied: Those whose frozen copy in the cloud takes part.
    """

    trained: tuple[str, ...]
    exchanged: tuple[str, ...]
    copied: tuple[str, ...]


@dataclass
class Asked:
    """What one group was asked in forward, with the graph that backward needs."""

    inputs: list[Tensor]
    outputs: list[Tensor]


class LocalAdapters:
    """The adapted projections of the span.

    Args:
        model: The transformers model, with PEFT's layers in it.
        names: Paths of the projections.
        groups: What the server told of its groups: number, block, and the names in each.
        killed: One of `KILLED`.
    """

    def __init__(self, model: nn.Module, names: list[str], groups: list[dict[str, Any]], killed: str):
        self.killed = killed
        self.ever: set[str] = set()
        """Projections that ever had a say: below the lowest of them the cloud's hidden states never change."""
        self.take(model, names, groups)

    def take(self, model: nn.Module, names: list[str], groups: list[dict[str, Any]]) -> None:
        """Serve these projections from now on; arguments as of the class."""
        self.layers: dict[str, LoraLayer] = {name: model.get_submodule(name) for name in names}
        self.groups = {group["number"]: [name for name in group["names"] if name in self.layers] for group in groups}
        self.block_of = {name: group["block"] for group in groups for name in group["names"]}

    @property
    def crosses_at_rank(self) -> bool:
        """Whether cores of r x r cross, instead of hidden states."""
        return any(isinstance(b, CoreB) for layer in self.layers.values() for b in layer.lora_B.values())

    def alive(self, training: bool) -> Alive:
        """Which adapters take part in a pass now."""
        trained, exchanged, copied = [], [], []
        for names in self.groups.values():
            for name in names:
                layer = self.layers[name]
                if layer.disable_adapters or not layer.active_adapters:
                    continue
                learns = training and any(parameter.requires_grad for parameter in _own(layer))
                if learns:
                    trained.append(name)
                elif not _adds(layer):
                    continue
                if not learns and self.killed == "cloud_copy" and not _is_thawed(layer):
                    copied.append(name)
                else:
                    exchanged.append(name)
        self.ever.update(exchanged, copied)
        return Alive(tuple(trained), tuple(exchanged), tuple(copied))

    def identity(self, name: str) -> tuple[tuple[int, int], ...]:
        """What changes when a projection's adapter becomes another one, or has other weights."""
        return tuple((id(parameter), parameter._version) for parameter in _own(self.layers[name]))

    def parameters(self, names: tuple[str, ...]) -> list[nn.Parameter]:
        """Trainable parameters of some projections' adapters."""
        return [parameter for name in names for parameter in _own(self.layers[name]) if parameter.requires_grad]

    def lowest_group(self) -> int | None:
        """Number of the first group that ever had a say: its input is the same in every epoch."""
        return next((number for number, names in self.groups.items() if self.ever.intersection(names)), None)

    def answer(self, names: list[str], inputs: list[Tensor], asked: Asked | None, needs_grad: bool) -> list[Tensor]:
        """What the adapters of a group add.

        Args:
            names: The group's projections that are exchanged.
            inputs: The input that they share [batch, tokens, in], or one for each [batch, tokens, r].
            asked: Is given the graph, if there is to be one.
            needs_grad: Whether backward will ask for the gradient of the inputs.
        """
        device = _own(self.layers[names[0]])[0].device
        with torch.set_grad_enabled(asked is not None):
            inputs = [value.to(device) for value in inputs]
            if asked is not None:
                inputs = [value.requires_grad_(needs_grad) for value in inputs]
            if self.crosses_at_rank:
                found = [_core(self.layers[name], u) for name, u in zip(names, inputs, strict=True)]
            else:
                found = [self.layers[name](inputs[0]) for name in names]
        if asked is not None:
            asked.inputs, asked.outputs = inputs, found
        return [value.detach() for value in found]

    def backward(
        self, names: list[str], asked: Asked, grads: list[Tensor], needs_grad: bool, into: dict[int, Tensor]
    ) -> list[Tensor]:
        """Gradients of a group's inputs; those of its parameters are put `into` a dictionary by their identity."""
        parameters = self.parameters(tuple(names))
        wanted = [*parameters, *(asked.inputs if needs_grad else [])]
        pairs = [(out, grad) for out, grad in zip(asked.outputs, grads, strict=True) if out.requires_grad]
        if not pairs or not wanted:
            return [torch.zeros_like(value) for value in asked.inputs] if needs_grad else []
        outputs, given = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, wanted, given, allow_unused=True)
        for parameter, grad in zip(parameters, found, strict=False):
            if grad is not None:
                into[id(parameter)] = grad
        missing = found[len(parameters) :]
        return [
            torch.zeros_like(value) if grad is None else grad
            for value, grad in zip(asked.inputs, missing, strict=False)
        ]

    def reset(self, names: list[str]) -> None:
        """Set adapters back to where they add nothing; what they learned is gone, what their optimizer knows stays."""
        with torch.no_grad():
            for name in names:
                for adapter in self.layers[name].active_adapters:
                    _b_of(self.layers[name], adapter).zero_()

    def copies(self, names: list[str], version: int) -> Message | None:
        """Frozen copies of some projections' adapters, for the cloud; None of none."""
        if not names:
            return None
        tensors = {}
        for number, name in enumerate(names):
            tensors[f"a{number}"], tensors[f"b{number}"] = folded(self.layers[name])
        return Message("copies", {"names": names, "version": version}, tensors)


def folded(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of all active adapters of a layer together, their scale in B."""
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    a = torch.cat([layer.lora_A[adapter].weight.detach() for adapter in adapters])
    b = torch.cat([layer.lora_B[adapter].weight.detach() * layer.scaling[adapter] for adapter in adapters], 1)
    return a, b


def _adds(layer: LoraLayer) -> bool:
    """Whether a layer's adapters add anything but zeros."""
    return any(bool(_b_of(layer, adapter).any()) for adapter in layer.active_adapters if adapter in layer.lora_B)


def _own(layer: LoraLayer) -> list[nn.Parameter]:
    return [parameter for name, parameter in layer.named_parameters() if not name.startswith("base_layer.")]


def _is_thawed(layer: LoraLayer) -> bool:
    return any(parameter.requires_grad for parameter in _own(layer))


def _b_of(layer: LoraLayer, adapter: str) -> Tensor:
    b = layer.lora_B[adapter]
    return b.core if isinstance(b, CoreB) else b.weight


def _core(layer: LoraLayer, u: Tensor) -> Tensor:
    (adapter,) = layer.active_adapters
    return layer.lora_B[adapter].narrow(u.to(layer.lora_B[adapter].core.dtype)) * layer.scaling[adapter]


def check_answerable(message: Message, groups: dict[int, list[str]]) -> int:
    """The group that the cloud asks for.

    Raises:
        WireError: If there is no such group.
    """
    number = message.fields.get("group")
    if type(number) is not int or number not in groups:
        raise WireError(f"the cloud asks for group {number!r:.20}, which this edge does not have")
    return number
