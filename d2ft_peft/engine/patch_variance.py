"""How much there is to see in each patch of an image: the variance of its pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..partition import Partition
from .intercept import Intercept


class PatchVariance(Intercept):
    """Stands before the convolution that makes tokens of patches, and notes the variance of each for the choice."""

    @torch.compiler.disable
    def __call__(self, pixels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tokens = self.runtime.tokens
        if tokens is not None and self.runtime.trains:
            tokens.variance = patch_variance(pixels.detach().float(), self.module.kernel_size)
        return self.original(pixels, *args, **kwargs)


def patch_variance(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Variance of the pixels of each patch, [B, N], mean over the channels.

    Args:
        pixels: Images [B, C, H, W].
        size: Height and width of a patch.
    """
    of_channels = [
        nn.functional.unfold(pixels[:, c : c + 1], size, stride=size).var(1, unbiased=False)
        for c in range(pixels.shape[1])
    ]
    return torch.stack(of_channels).mean(0)


def find_patches(model: nn.Module, partition: Partition) -> list[nn.Conv2d]:
    """The convolution that makes tokens of patches, one stride apart each, and the adapters' copies of it."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and not name.startswith(partition.blocks)
        and module.kernel_size == module.stride
        and not any(module.padding)
    ]
