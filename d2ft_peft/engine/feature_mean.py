"""What stands in for skipped heads under ``shortcut="mean"``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..partition import FeatureLayout
from .plan import Heads


class FeatureMean:
    """Running mean of the row-parallel input features of one branch, for ``shortcut="mean"``.

    What a micro-batch shows is taken over when the next one begins, so that recomputation under gradient
    checkpointing sees the same values as the forward pass.

    Attributes:
        value: Mean of every feature, float [heads, features of a head].
        count: Micro-batches that each head was seen in, [heads].
    """

    horizon = 100
    """Micro-batches after which the mean becomes an exponential average, since the weights move."""

    def __init__(self, layout: FeatureLayout):
        self.value = torch.zeros(layout.heads, layout.head_size)
        self.count = torch.zeros(layout.heads)
        self._parts = len(layout.part_widths)
        self._seen: list[tuple[Heads, Tensor]] = []

    def observe(self, heads: Heads, x: Tensor) -> None:
        """Note the features [..., features of `heads`], as they lie in the row-parallel projection's input."""
        mean = x.detach().float().flatten(0, -2).mean(0)
        self._seen.append((heads, mean.view(self._parts, len(heads), -1).transpose(0, 1).flatten(1)))

    def features(self, heads: Heads) -> Tensor:
        """The means of some heads as they lie in that input."""
        of_heads = self.value[heads.index(self.value.device)]
        return of_heads.unflatten(1, (self._parts, -1)).transpose(0, 1).flatten()

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
