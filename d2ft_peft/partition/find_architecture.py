"""Where a model keeps its blocks, heads and projections: asked of the table, of its tensor-parallel plan, of itself."""

from __future__ import annotations

from torch import nn

from .architecture import Described, known_architecture
from .structure import read_structure
from .tp_plan import architecture_of_plan


def find_architecture(model: nn.Module) -> Described:
    """Return the architecture of a transformers model, from the table, its tensor-parallel plan, or its modules; one
    for each of several stacks.

    Raises:
        ValueError: If the model cannot be cut into heads; the message says why.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    known = known_architecture(model_type, config)
    if known is not None:
        return known
    plan = getattr(config, "base_model_tp_plan", None)
    planned = architecture_of_plan(model, model_type, plan) if plan else None
    if planned is not None:
        return planned
    return read_structure(model)
