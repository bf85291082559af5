"""What stands in for skipped heads under ``shortcut="mean"``."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Heads


class FeatureMean:
    """Running mean of the row-parallel input features of one branch, for ``shortcut="mean"``.

    What a micro-batch shows is taken over when the next one begins, so that recomputation under gradient
    checkpointing sees the same values as the forward pass.

    Attributes:
        value: Mean of every feature, float [heads, width].
        count: Micro-batches that each head was seen in, [heads].
    """

    horizon = 100
    """Micro-batches after which the mean becomes an exponential average, since the weights move."""

    def __init__(self, heads: int, width: int):
        self.value = torch.zeros(heads, width)
        self.count = torch.zeros(heads)
        self._seen: list[tuple[Heads, Tensor]] = []

    def observe(self, heads: Heads, x: Tensor) -> None:
        """Note the features [..., len(heads) * width] of `heads`."""
        mean = x.detach().float().flatten(0, -2).mean(0)
        self._seen.append((heads, mean.reshape(len(heads), -1)))

    def commit(self) -> None:
        """Take over what was observed since the last commit."""
        for heads, mean in self._seen:
            self.value, self.count = self.value.to(mean.device), self.count.to(mean.device)
            index = heads.index(mean.device)
            self.count[index] = (self.count[index] + 1).clamp(max=self.horizon)
            self.value[index] += (mean - self.value[index]) / self.count[index, None]
        self._seen.clear()

    def discard(self) -> None:
        """Forget what was observed since the last commit."""
        self._seen.clear()
