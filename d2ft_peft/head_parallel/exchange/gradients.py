"""Gradients after a step: summed over the ranks that have a parameter, and clipped by their common norm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ..storage.shard import Shard
from .ranks import Ranks


_AFTER = "after the blocks"


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

    @property
    def _heads(self) -> list[nn.Parameter]:
        return [p for p in self._trained if id(p) in self._cut]

    @contextmanager
    def of_one_step(self) -> Iterator[None]:
        """Put gradients that are already summed over ranks aside meanwhile, and add them afterwards."""
        summed = self._replicated if self._ranks.num_replicas == 1 else self._trained
        earlier = [(p, p.grad) for p in summed if p.grad is not None]
        for parameter, _ in earlier:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient in earlier:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def reduce(self, loss: Tensor, operations: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Sum the gradients of replicated parameters over all ranks, those of heads over the replicas.

        A parameter that no rank has a gradient for stays without, as in one process, except that a projection that
        was FULL nowhere has a gradient of zero (see `D2FTPlanner`).

        Args:
            loss: This rank's part of the mean loss, summed in place.
            operations: What this rank's heads did, int [n, K].

        Returns:
            The mean loss, and what all heads did.
        """
        replicated = self._replicated
        numbers = [[p.grad is not None for p in replicated], operations.flatten()]
        summed = self._ranks.sum_array(np.concatenate(numbers), "check", _AFTER, "all")
        flags, everyone = np.split(summed, [len(replicated)])
        with_gradient = [p for p, flag in zip(replicated, flags, strict=True) if flag]
        self._ranks.all_reduce(loss, "check", _AFTER, "all")
        self._sum(with_gradient, "gradients", "all")
        if self._ranks.num_replicas > 1:
            # Replicas run the same operations, so that they agree on which heads have gradients.
            self._sum([p for p in self._heads if p.grad is not None], "gradients of heads", "data")
        for parameter in self._trained:
            if parameter.grad is None and id(parameter) in self._of_projections:
                parameter.grad = torch.zeros_like(parameter)
        everyone = everyone.reshape(operations.shape) / self._ranks.num_replicas
        return loss, everyone.astype(operations.dtype)

    def _sum(self, parameters: list[nn.Parameter], purpose: str, axis: str) -> None:
        for dtype in dict.fromkeys(p.dtype for p in parameters):
            alike = [p for p in parameters if p.dtype == dtype]
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in alike]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self._ranks.all_reduce(flat, purpose, _AFTER, axis)
            for parameter, part in zip(alike, flat.split([p.numel() for p in alike]), strict=True):
                parameter.grad = part.view_as(parameter)

    def clip(self, max_norm: float) -> Tensor:
        """See `HeadParallel.clip_grad_norm_`."""
        replicated = [p for p in self._replicated if p.grad is not None]
        heads = [p for p in self._heads if p.grad is not None]
        # One sum over all ranks, so that the replicas get the same bits and stay alike.
        of_heads = self._square(heads) / self._ranks.num_replicas
        square = self._square(replicated) + self._ranks.all_reduce(of_heads, "check", _AFTER, "all")
        norm = square.sqrt()
        torch.nn.utils.clip_grads_with_norm_([*replicated, *heads], max_norm, norm)
        return norm

    def _square(self, parameters: list[nn.Parameter]) -> Tensor:
        """Squared norm of the gradients, float64, left on the device."""
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters]
        return torch.stack([torch.zeros((), dtype=torch.float64, device=self._ranks.device), *norms]).square().sum()
