"""A loss that reaches the parameters even where a plan trains none of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from .runtime import Runtime


class TouchLoss:
    """Forward hook of the whole model: under a plan its loss always has a backward pass.

    In a micro-batch in which nothing is FULL no parameter may reach the loss. Under DistributedDataParallel every
    trainable parameter receives a gradient, zero where it was skipped: all ranks reduce the same buckets, and there is
    no need to look for unused parameters.
    """

    def __init__(self, model: nn.Module, runtime: Runtime):
        self.model, self.runtime = model, runtime

    def __call__(self, module: nn.Module, args: tuple, outputs: Any) -> Any:
        if not module.training or self.runtime.plan is None or not torch.is_grad_enabled():
            return outputs
        # The loss where the model computes it, else what the caller computes it from.
        is_tensor = isinstance(outputs, Tensor)
        named = {None: outputs} if is_tensor else dict(enumerate(outputs)) if type(outputs) is tuple else outputs
        name, value = next((n, v) for n, v in named.items() if isinstance(v, Tensor) and v.is_floating_point())
        if self.runtime.touch_gradients:
            value = _Touch.apply(value, *(p for p in self.model.parameters() if p.requires_grad))
        elif not value.requires_grad:
            # Not a leaf itself: the Trainer scales losses in place.
            value = value.requires_grad_().clone()
        if self.runtime.after_backward is not None:
            value.register_hook(self._when_backward_begins)
        if is_tensor:
            return value
        if type(outputs) is tuple:
            return (*outputs[:name], value, *outputs[name + 1 :])
        outputs[name] = value
        return outputs

    def _when_backward_begins(self, grad: Tensor) -> None:
        # The engine runs these callbacks in their order: this one before that of DistributedDataParallel, which waits
        # for the other processes and is queued when the last gradients are complete.
        Variable._execution_engine.queue_callback(self.runtime.after_backward)


class _Touch(torch.autograd.Function):
    """Identity that hands every parameter a zero gradient."""

    @staticmethod
    def forward(ctx, value, *parameters):
        ctx.save_for_backward(*parameters)
        return value.clone()  # no view: the Trainer scales losses in place

    @staticmethod
    def backward(ctx, grad):
        return grad, *(torch.zeros_like(p) for p in ctx.saved_tensors)
