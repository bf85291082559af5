"""Which adapters can live across a link, and which of their modules do."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftModel
from torch import Tensor, nn


_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")
"""Those of LoRA that do not look at the weights."""
_VARIANTS = (
    "lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
    "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
"""Fields of a LoraConfig under which a layer is more, or other, than B A."""
_OF_EVERY_BLOCK = ("output_hidden_states", "output_attentions", "output_router_logits")
"""What a model answers of every single block."""
_CROSSES = {"self", "attention_mask", "position_ids", "past_key_values", "labels", "num_items_in_batch"}
_USED_BELOW = {"input_ids", "inputs_embeds", "pixel_values", "token_type_ids", "bool_masked_pos"}
_SAID_BY_POSITIONS = {"cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""Arguments that blocks do without: they cross, or the embedding uses them, or positions say the same."""


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
    variants = [name for name in _VARIANTS if getattr(config, name, None)]
    if variants:
        raise ValueError(
            f"{variants[0]} changes what an adapter computes, of which the cloud knows A and B; leave it out."
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


def check_arguments(given: dict[str, Any], body: nn.Module) -> None:
    """Refuse arguments of a model that its blocks would get, or would have to answer, where some are in the cloud.

    Args:
        given: Arguments of the model around the blocks, by name.
        body: That model.

    Raises:
        ValueError: If there is one.
    """
    for name in _OF_EVERY_BLOCK:
        value = given.get(name)
        if value is None:
            value = getattr(body.config, name, False)
        if value is not None and value is not False:
            raise ValueError(f"{name}={value!r}: of the blocks in the cloud only the last output comes; leave it out.")
    known = _CROSSES | _USED_BELOW | _SAID_BY_POSITIONS
    for name, value in given.items():
        if name not in known and isinstance(value, (Tensor, list, tuple, dict)):
            raise ValueError(f"{name} would reach blocks that are in the cloud, and does not cross; leave it out.")


def check_head_in_cloud(model: PeftModel, stack: str) -> None:
    """Refuse what would train above the blocks, where norm and head are the cloud's.

    Raises:
        ValueError: If there is such a parameter.
    """
    base = model.get_base_model()
    embedding = base.get_input_embeddings()
    below = set() if base.config.get_text_config().tie_word_embeddings else set(embedding.parameters())
    for name, parameter in base.named_parameters():
        if parameter.requires_grad and not name.startswith(f"{stack}.") and parameter not in below:
            raise ValueError(
                f"head='cloud': {name} would be trained, of which the head in the cloud would learn nothing; leave it "
                "out of the adapter, or use head='edge'."
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
