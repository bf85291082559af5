"""A model as it is at inference, for a look at it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..tuners.adapter_checks import is_dense


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run a model as at inference, then give every module its training flag back.

    Quantized layers run as in training, which gives the same: at inference bitsandbytes packs 4 bit weights anew on
    some CPUs, and no gradient passes what it packed so ever after.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in flags:
        if any(not is_dense(parameter) for parameter in module.parameters(recurse=False)):
            module.training = True
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
