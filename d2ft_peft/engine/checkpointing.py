"""Gradient checkpointing of a block: recomputed under the plan that its forward pass had."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn


if TYPE_CHECKING:
    from .runtime import Runtime


class PlannedCheckpoint:
    """A block's checkpointing function that recomputes under the plan of the forward pass.

    Recomputation happens in backward, when another plan may be current; without this the gradients would be those of
    other heads, without an error. A block in which nothing learns is not checkpointed at all.
    """

    def __init__(self, checkpoint, runtime: Runtime, block: nn.Module):
        self.checkpoint, self.runtime, self.block = checkpoint, runtime, block

    @torch.compiler.disable
    def __call__(self, function, *args):
        entry = next((one for one in self.runtime.entries if one.module is self.block), None)
        if entry is None:
            return self._checkpointed(function, *args)

        # Up to transformers 5.17 blocks are checkpointed around their forward, where the entry then has to stand.
        def run(*args: Any, **kwargs: Any) -> Any:
            return self._checkpointed(partial(function.func, *function.args, **kwargs), *args)

        if not isinstance(function, partial):
            return entry.around(partial(self._checkpointed, function), args, {})
        return entry.around(run, args, function.keywords)

    def _checkpointed(self, function, *args):
        if not torch.is_grad_enabled():
            return function(*args)
        reentrant = getattr(self.checkpoint, "keywords", {}).get("use_reentrant")
        if reentrant and self.runtime.touch_gradients and self.runtime.plan is not None:
            raise ValueError(
                "use_reentrant=True runs a backward pass of its own for each block, and DistributedDataParallel would "
                "meet the block's parameters twice; set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        under_plan = _UnderPlan(self.runtime, function)
        if not reentrant or self.runtime.plan is None or any(_requires_grad(value) for value in args):
            return self.checkpoint(under_plan, *args)
        # Reentrant checkpointing has a backward pass only where an argument requires a gradient.
        learns = torch.empty(0, requires_grad=True)
        return self.checkpoint(lambda _, *given: under_plan(*given), learns, *args)


class _UnderPlan:
    def __init__(self, runtime: Runtime, function):
        self.runtime, self.function = runtime, function
        self.plan, self.grad_at_entry = runtime.plan, torch.is_grad_enabled()
        self.reading, self.token_pass = runtime.reading, runtime.token_pass

    def __call__(self, *args):
        runtime = self.runtime
        current = runtime.plan, runtime.grad_at_entry, runtime.reading, runtime.token_pass
        runtime.plan, runtime.grad_at_entry, runtime.reading = self.plan, self.grad_at_entry, self.reading
        recomputes = in_backward()
        if recomputes:  # a forward pass begins within its first block
            runtime.token_pass = self.token_pass
        try:
            return self.function(*args)
        finally:
            runtime.plan, runtime.grad_at_entry, runtime.reading = current[:3]
            if recomputes:
                runtime.token_pass = current[3]


def in_backward() -> bool:
    """Whether autograd is running a backward pass: a forward pass is then a recomputation."""
    return torch._C._current_graph_task_id() != -1


def _requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def bind_checkpointing(block: nn.Module, runtime: Runtime) -> None:
    """Let a block that is checkpointed recompute under its plan."""
    # Checkpointing is switched on at any time and sets the function anew, hence the look at every micro-batch.
    function = block.__dict__.get("_gradient_checkpointing_func")
    if function is not None and not isinstance(function, PlannedCheckpoint):
        block._gradient_checkpointing_func = PlannedCheckpoint(function, runtime, block)


def unbind_checkpointing(block: nn.Module) -> None:
    """Give a block its own checkpointing function back."""
    function = block.__dict__.get("_gradient_checkpointing_func")
    if isinstance(function, PlannedCheckpoint):
        block._gradient_checkpointing_func = function.checkpoint
