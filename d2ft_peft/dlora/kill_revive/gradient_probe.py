"""Gradient norms of idle modules, read in one backward pass that leaves no other trace."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .adapted_modules import AdaptedModule


class GradientProbe:
    """Reads the gradient norm of every module in the next backward pass.

    Idle modules are thawed for it. Their gradients are dropped as soon as their norms are taken, so that neither
    clipping nor an optimizer sees them, and only one of them is in memory at a time. Gradients of active modules are
    only looked at.

    Args:
        modules: All of them.
        active: Indices of those that train.

    Attributes:
        ran: Whether a backward pass has reached a module.
    """

    def __init__(self, modules: Sequence[AdaptedModule], active: Sequence[int]):
        self.ran = False
        self._squares: list[dict[int, Tensor]] = [{} for _ in modules]
        self._idle = [module for index, module in enumerate(modules) if index not in set(active)]
        self._handles = []
        for module in self._idle:
            for parameter in module.parameters:
                parameter.requires_grad_(True)
        for index, module in enumerate(modules):
            for number, parameter in enumerate(module.parameters):
                if index in set(active):
                    handle = parameter.register_hook(partial(self._look, index, number))
                else:
                    hook = partial(self._take, index, number)
                    handle = parameter.register_post_accumulate_grad_hook(hook)
                self._handles.append(handle)

    def _look(self, index: int, number: int, gradient: Tensor) -> None:
        self.ran = True
        if number not in self._squares[index]:
            self._squares[index][number] = square_of(gradient)

    def _take(self, index: int, number: int, parameter: nn.Parameter) -> None:
        self._look(index, number, parameter.grad)
        parameter.grad = None

    def close(self) -> list[float | None]:
        """End the probe and freeze idle modules again.

        Returns:
            L2 norm of the gradient of each module; None for those that the pass did not reach.
        """
        for handle in self._handles:
            handle.remove()
        for module in self._idle:
            for parameter in module.parameters:
                parameter.requires_grad_(False)
        return norms([list(squares.values()) or None for squares in self._squares])


def square_of(tensor: Tensor) -> Tensor:
    """Squared L2 norm, in float32 at least."""
    values = tensor.detach()
    wide = values.dtype if values.is_complex() else torch.promote_types(values.dtype, torch.float32)
    return torch.linalg.vector_norm(values.to(wide)) ** 2


def norms(squares: Sequence[Sequence[Tensor] | None]) -> list[float | None]:
    """Norms from the squares of their parts, moved to the host at once; None stays None."""
    sums = [None if parts is None else torch.stack(list(parts)).sum() for parts in squares]
    known = [total for total in sums if total is not None]
    values = iter(torch.stack([total.to(known[0].device) for total in known]).sqrt().tolist() if known else [])
    return [None if total is None else next(values) for total in sums]
