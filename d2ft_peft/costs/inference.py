"""A model as it is at inference, for a look at it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..tuners.adapter_checks import is_dense


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run a model as at inference, then give every module its training flag back.

    Quantized layers run as in training, which gives the same: at inference bitsandbytes packs 4 bit weights anew on
    some CPUs, and no gradient passes what it packed so ever after. ``nn.MultiheadAttention`` runs as in training as
    well, operation by operation: at inference it is one fused kernel, whose FLOPs no counter knows.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    for module, _ in flags:
        if any(not is_dense(parameter) for parameter in module.parameters(recurse=False)):
            module.training = True
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, flag in flags:
            module.training = flag
