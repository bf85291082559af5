"""Where backward passes end."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def let_backward_end(base: nn.Module) -> Any:
    """Undo `enable_input_require_grads` where checkpointing does not need it: with it every backward pass goes down to
    the embeddings, whatever trains.

    Returns:
        The handle of the hook that does so; None for a model whose embeddings are not known.
    """
    try:
        embeddings = base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    checkpointed = [module for module in base.modules() if hasattr(module, "gradient_checkpointing")]

    def needs_no_gradient() -> bool:
        functions = [getattr(m, "_gradient_checkpointing_func", None) for m in checkpointed if m.gradient_checkpointing]
        words = [getattr(function, "keywords", {}) for function in functions]
        return bool(words) and all(keywords.get("use_reentrant") is False for keywords in words)

    def end(module: nn.Module, args: tuple, output: Any) -> Any:
        frozen = not any(parameter.requires_grad for parameter in module.parameters())
        return output.detach() if isinstance(output, torch.Tensor) and frozen and needs_no_gradient() else output

    return embeddings.register_forward_hook(end) if isinstance(embeddings, nn.Module) else None
