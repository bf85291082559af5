"""Gradients after a step: summed over ranks where a parameter is on all of them, and clipped by their common norm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from .ranks import Ranks
from .shard import Shard


_AFTER = "after the blocks"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Gradients:
    """The trained parameters of a cut model.

    Args:
        model: The model.
        projections: Its projections.
        shards: Its cut parameters.
        ranks: The processes.
    """

    def __init__(self, model: nn.Module, projections: list[nn.Module], shards: list[Shard], ranks: Ranks):
        self._model, self._ranks = model, ranks
        self._cut = {id(shard.tensor) for shard in shards}
        self._of_projections = {id(p) for module in projections for p in module.parameters()}

    @property
    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self._model.parameters() if p.requires_grad]

    @property
    def _replicated(self) -> list[nn.Parameter]:
        return [p for p in self._trained if id(p) not in self._cut]

    @contextmanager
    def of_one_step(self) -> Iterator[None]:
        """Put gradients that are already summed over ranks aside meanwhile, and add them afterwards."""
        earlier = [(p, p.grad) for p in self._replicated if p.grad is not None]
        for parameter, _ in earlier:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient in earlier:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def reduce(self, loss: Tensor, operations: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Sum the gradients of replicated parameters over ranks.

        A parameter that no rank has a gradient for stays without, as in one process, except that a projection that
        was FULL nowhere has a gradient of zero (see `D2FTPlanner`).

        Args:
            loss: This rank's part of the mean loss.
            operations: What this rank's heads did, int [n, K].

        Returns:
            The mean loss, and what all heads did.
        """
        replicated = self._replicated
        numbers = [[loss.item()], [p.grad is not None for p in replicated], operations.flatten()]
        summed = self._ranks.sum_array(np.concatenate(numbers), "check", _AFTER)
        flags = summed[1 : 1 + len(replicated)]
        with_gradient = [p for p, flag in zip(replicated, flags, strict=True) if flag]
        for dtype in dict.fromkeys(p.dtype for p in with_gradient):
            self._sum([p for p in with_gradient if p.dtype == dtype])
        for parameter in self._trained:
            if parameter.grad is None and id(parameter) in self._of_projections:
                parameter.grad = torch.zeros_like(parameter)
        everyone = summed[1 + len(replicated) :].reshape(operations.shape).astype(operations.dtype)
        return loss.new_tensor(summed[0]), everyone

    def _sum(self, parameters: list[nn.Parameter]) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._ranks.all_reduce(flat, "gradients", _AFTER)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def clip(self, max_norm: float) -> Tensor:
        """See `HeadParallel.clip_grad_norm_`."""
        parameters = [p for p in self._trained if p.grad is not None]
        squares = np.zeros(2)
        for parameter in parameters:
            squares[int(id(parameter) in self._cut)] += parameter.grad.double().square().sum().item()
        squares[1] = self._ranks.sum_array(squares[1:], "check", _AFTER)[0]
        norm = torch.tensor(np.sqrt(squares.sum()), device=self._ranks.device)
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm


def checksum(tensor: Tensor) -> int:
    """Sum of a tensor's bits, taken as integers: exact, so equal tensors have equal sums on every device."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64).item()
