"""Hooks of a model at which Kill-and-Revive looks after what is frozen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn


if TYPE_CHECKING:
    from .kill_revive import KillRevive


class Gate:
    """Stands before and behind a model's forward pass, and before its backward pass.

    PEFT's ``disable_adapter``, around a reference pass without the adapter, makes all adapters trainable when it ends.
    If that is before the backward pass, checkpointed blocks would run again otherwise than they ran first.

    A copy of the model, made to keep or to send it, has one that does nothing.

    Args:
        owner: What kills and revives.
    """

    def __init__(self, owner: KillRevive | None = None):
        self.owner, self._handles = owner, []

    def open(self, base: nn.Module) -> None:
        """Install the hooks."""
        self._handles = [base.register_forward_pre_hook(self.before), base.register_forward_hook(self.behind)]

    def close(self) -> None:
        """Remove them."""
        for handle in self._handles:
            handle.remove()

    @torch.compiler.disable
    def before(self, module: nn.Module, args: tuple) -> None:
        """Before a forward pass."""
        if self.owner is not None:
            self.owner.before_forward()

    @torch.compiler.disable
    def behind(self, module: nn.Module, args: tuple, outputs: Any) -> None:
        """Behind a forward pass: let whatever a backward pass begins at tell of it."""
        if self.owner is None or not torch.is_grad_enabled():
            return
        for value in _values(outputs):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(self._backward_begins)

    def _backward_begins(self, gradient: Tensor) -> None:
        if self.owner is not None:
            self.owner.before_backward()

    def __deepcopy__(self, memo: dict) -> Gate:
        return Gate()

    def __reduce__(self) -> tuple:
        return Gate, ()


def owner_of(base: nn.Module) -> KillRevive | None:
    """What kills and revives modules of a model; None if nothing does."""
    for hook in base._forward_pre_hooks.values():
        gate = getattr(hook, "__self__", None)
        if isinstance(gate, Gate) and gate.owner is not None:
            return gate.owner
    return None


def _values(outputs: Any) -> Iterable[Any]:
    if isinstance(outputs, Tensor):
        return (outputs,)
    return outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple) else ()
