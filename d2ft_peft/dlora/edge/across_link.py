"""Which adapters can live across a link, and which of their modules do."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel


_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")
"""Those of LoRA that do not look at the weights."""


def check_adapter(config: Any, in_flight: int, crossing: str) -> None:
    """Refuse an adapter that needs what the edge does not have.

    Raises:
        ValueError: If it is not LoRA, or looks at weights of the cloud, or trains them, or could not be repeated.
    """
    if not isinstance(config, LoraConfig):
        raise ValueError(f"config is a {type(config).__name__}; adapters across a link are LoRA's, give a LoraConfig.")
    if config.lora_dropout and in_flight > 1:
        raise ValueError(
            f"lora_dropout={config.lora_dropout} with in_flight={in_flight}: parts of a batch would draw in any order, "
            "and no run could be repeated; leave one of them out."
        )
    if config.use_dora or config.init_lora_weights not in _INITIALIZATIONS:
        raise ValueError(
            f"use_dora={config.use_dora}, init_lora_weights={config.init_lora_weights!r} look at weights that only the "
            f"cloud has; use plain LoRA, initialized with one of {', '.join(map(repr, _INITIALIZATIONS))}."
        )
    if config.bias != "none" or config.target_parameters:
        raise ValueError(
            f"bias={config.bias!r}, target_parameters={config.target_parameters!r} train what the cloud owns; leave "
            "them out."
        )
    if crossing == "core" and (config.lora_dropout or config.rank_pattern):
        raise ValueError(
            f"lora_dropout={config.lora_dropout}, rank_pattern={config.rank_pattern}: cores have one rank, and their "
            "input is made in the cloud, without dropout; leave both out."
        )


def modules_across(model: PeftModel, stack: str, span: range) -> list[str]:
    """Paths of adapted projections in the span.

    Raises:
        ValueError: If something else in the span would be trained.
    """
    prefixes = tuple(f"{stack}.{index}." for index in span)
    base = model.get_base_model()
    names = [name for name, module in base.named_modules() if name.startswith(prefixes) and hasattr(module, "lora_A")]
    other = [
        name
        for name, parameter in base.named_parameters()
        if name.startswith(prefixes) and parameter.requires_grad and "lora_" not in name
    ]
    if other:
        raise ValueError(f"{other[0]} would be trained, and belongs to the cloud; leave it out of modules_to_save.")
    return names
