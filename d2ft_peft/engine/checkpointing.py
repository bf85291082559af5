"""Gradient checkpointing of a block: recomputed under the plan that its forward pass had."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn


if TYPE_CHECKING:
    from .runtime import Runtime


class PlannedCheckpoint:
    """A block's checkpointing function that recomputes under the plan of the forward pass.

    Recomputation happens in backward, when another plan may be current; without this the gradients would be those of
    other heads, without an error.
    """

    def __init__(self, checkpoint, runtime: Runtime):
        self.checkpoint, self.runtime = checkpoint, runtime

    @torch.compiler.disable
    def __call__(self, function, *args):
        reentrant = getattr(self.checkpoint, "keywords", {}).get("use_reentrant")
        if reentrant and self.runtime.touch_gradients and self.runtime.plan is not None:
            raise ValueError(
                "use_reentrant=True runs a backward pass of its own for each block, and DistributedDataParallel would "
                "meet the block's parameters twice; set gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        return self.checkpoint(_UnderPlan(self.runtime, function), *args)


class _UnderPlan:
    def __init__(self, runtime: Runtime, function):
        self.runtime, self.function = runtime, function
        self.plan, self.grad_at_entry = runtime.plan, torch.is_grad_enabled()
        self.token_pass = runtime.token_pass

    def __call__(self, *args):
        runtime = self.runtime
        current = runtime.plan, runtime.grad_at_entry, runtime.token_pass
        runtime.plan, runtime.grad_at_entry = self.plan, self.grad_at_entry
        recomputes = in_backward()
        if recomputes:  # a forward pass begins within its first block
            runtime.token_pass = self.token_pass
        try:
            return self.function(*args)
        finally:
            runtime.plan, runtime.grad_at_entry = current[:2]
            if recomputes:
                runtime.token_pass = current[2]


def in_backward() -> bool:
    """Whether autograd is running a backward pass: a forward pass is then a recomputation."""
    return torch._C._current_graph_task_id() != -1


def bind_checkpointing(block: nn.Module, runtime: Runtime) -> None:
    """Let a block that is checkpointed recompute under its plan."""
    # Checkpointing is switched on at any time and sets the function anew, hence the look at every micro-batch.
    function = block.__dict__.get("_gradient_checkpointing_func")
    if function is not None and not isinstance(function, PlannedCheckpoint):
        block._gradient_checkpointing_func = PlannedCheckpoint(function, runtime)


def unbind_checkpointing(block: nn.Module) -> None:
    """Give a block its own checkpointing function back."""
    function = block.__dict__.get("_gradient_checkpointing_func")
    if isinstance(function, PlannedCheckpoint):
        block._gradient_checkpointing_func = function.checkpoint
