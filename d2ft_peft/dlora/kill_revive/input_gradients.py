"""Where backward passes end."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class _EndBackward:
    """Forward hook of the input embeddings: their output has no gradient, where nothing needs that it has one."""

    def __init__(self, checkpointed: list[nn.Module]):
        self.checkpointed = checkpointed

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        frozen = not any(parameter.requires_grad for parameter in module.parameters())
        return output.detach() if isinstance(output, torch.Tensor) and frozen and self._not_reentrant() else output

    def _not_reentrant(self) -> bool:
        on = [module for module in self.checkpointed if module.gradient_checkpointing]
        words = [getattr(getattr(m, "_gradient_checkpointing_func", None), "keywords", {}) for m in on]
        return bool(words) and all(keywords.get("use_reentrant") is False for keywords in words)


def let_backward_end(base: nn.Module) -> RemovableHandle | None:
    """Undo `enable_input_require_grads` where checkpointing does not need it: with it every backward pass goes down to
    the embeddings, whatever trains.

    Returns:
        The handle of the hook that does so; None for a model whose embeddings are not known.
    """
    try:
        embeddings = base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    if not isinstance(embeddings, nn.Module):
        return None
    checkpointed = [module for module in base.modules() if hasattr(module, "gradient_checkpointing")]
    return embeddings.register_forward_hook(_EndBackward(checkpointed))
