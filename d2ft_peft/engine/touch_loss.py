"""A loss that reaches the parameters even where a plan trains none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from .runtime import Runtime


def touch(loss: Tensor, parameters: Iterable[nn.Parameter], after_backward: Callable[[], None] | None = None) -> Tensor:
    """The loss, with an edge of the graph to each trainable parameter; along it no gradient flows.

    In backward every trainable parameter is met, also those that the plan trains nothing of. DistributedDataParallel
    then counts each as ready, with zeros where there is no gradient, so that all ranks reduce the same buckets and
    there is no need to look for unused parameters. Nothing is allocated, and gradients that are None stay None but for
    what DistributedDataParallel makes of them.

    Args:
        loss: Any floating-point tensor that the loss is computed from, or the loss itself.
        parameters: The parameters to reach; those that are not trainable are passed over. If none is trainable the loss
            is returned as it is.
        after_backward: Called when this process is through with the backward pass.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return _Touch.apply(loss, after_backward, *trainable) if trainable else loss


def nothing(loss: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """A loss of zero whose backward pass sends zeros through all that `outputs` were computed by.

    Where processes meet in backward (FSDP), one that has nothing to add goes along.

    Args:
        loss: What a loss over nothing came to: zero, or not a number.
        outputs: What the model returned; each requires a gradient.
    """
    return _Nothing.apply(loss, *outputs)


class TouchLoss:
    """Forward hook of the whole model: under a plan, whatever a loss is made of has a backward pass.

    Args:
        model: The whole model.
        runtime: Its state.
    """

    def __init__(self, model: nn.Module, runtime: Runtime):
        self.model, self.runtime = model, runtime
        runtime.model = model

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple, outputs: Any) -> Any:
        if self.runtime.plan is None or not self.runtime.trains:
            return outputs
        if isinstance(outputs, Tensor):
            return self._touched(outputs)
        if type(outputs) is tuple:
            return tuple(map(self._touched, outputs))
        for name, value in outputs.items():
            if isinstance(value, Tensor):
                outputs[name] = self._touched(value)
        return outputs

    def _touched(self, value: Any) -> Any:
        runtime = self.runtime
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if value.requires_grad and not runtime.touch_gradients and runtime.after_backward is None:
            return value
        return touch(value, self.model.parameters(), runtime.after_backward)


class _Touch(torch.autograd.Function):
    """Identity with edges to parameters."""

    @staticmethod
    def forward(ctx, value, after_backward, *parameters):
        ctx.num_parameters, ctx.after_backward = len(parameters), after_backward
        # A loss is copied, since the Trainer scales losses in place; logits are too large for it. Those that are part
        # of no graph need not be known as a view, of which FSDP warns.
        if value.ndim == 0:
            return value.clone()
        return value.view_as(value) if ctx.needs_input_grad[0] else value.data

    @staticmethod
    def backward(ctx, grad):
        if ctx.after_backward is not None:
            # The engine runs these callbacks in their order: this one before that of DistributedDataParallel, which
            # waits for the other processes and is queued when the last gradients are complete.
            Variable._execution_engine.queue_callback(ctx.after_backward)
        return grad, None, *[None] * ctx.num_parameters


class _Nothing(torch.autograd.Function):
    """Zero, with edges along which zeros flow."""

    @staticmethod
    def forward(ctx, loss, *outputs):
        ctx.like = [(output.shape, {"dtype": output.dtype, "device": output.device}) for output in outputs]
        return loss.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        return None, *[torch.zeros(shape, **like) for shape, like in ctx.like]
