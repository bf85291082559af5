"""Where a model keeps its blocks, heads and projections: asked of the table, then of its tensor-parallel plan."""

from __future__ import annotations

from torch import nn

from .architecture import Described, known_architecture, known_model_types
from .tp_plan import architecture_of_plan


def find_architecture(model: nn.Module) -> Described:
    """Return the architecture of a transformers model, from the table or from its tensor-parallel plan; one for each of
    several stacks.

    Raises:
        ValueError: If the model cannot be cut into heads; the message says why.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    known = known_architecture(model_type, config)
    if known is not None:
        return known
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise ValueError(
            f"model_type={model_type!r} is not known to D2FT and its config has no `base_model_tp_plan`; describe it "
            f"with d2ft_peft.register_architecture({model_type!r}, Architecture(...)). "
            f"Known: {', '.join(known_model_types())}."
        )
    return architecture_of_plan(model, model_type, plan)
