"""Fields that PEFT takes as they come: what they must be, said before they fail somewhere inside of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ..value_checks import check, check_integer, is_integer, is_number, is_positive


if TYPE_CHECKING:
    from .config import D2FTConfig

MOST_RANKS = 65_536
BIASES = ("none", "all", "lora_only")


def check_placement(config: D2FTConfig) -> None:
    """Check the fields that say where adapters are, for full fine-tuning and LoRA alike.

    Raises:
        ValueError: If one is of another type than PEFT reads.
    """
    layers, pattern = config.layers_to_transform, config.layers_pattern
    several = layers if isinstance(layers, (list, tuple, set)) else [layers]
    check(
        layers is None or all(is_integer(layer) and layer >= 0 for layer in several),
        "layers_to_transform", layers, "must be the number of a block, from 0 on, or a list of them, or None",
    )  # fmt: skip
    check(_is_names(pattern), "layers_pattern", pattern, "must be the name of a list of blocks, several, or None")


def check_lora_fields(config: D2FTConfig) -> None:
    """Check the fields of LoRA.

    Raises:
        ValueError: If one has a value with which PEFT would fail, or train nothing.
    """
    check(config.r <= MOST_RANKS, "r", config.r, f"must be at most {MOST_RANKS}; projections are no wider")
    check(is_positive(config.lora_alpha), "lora_alpha", config.lora_alpha, "must be a positive number")
    dropout = config.lora_dropout
    check(is_number(dropout) and 0 <= dropout < 1, "lora_dropout", dropout, "must be a number in [0, 1)")
    bias = config.bias
    check(isinstance(bias, str) and bias in BIASES, "bias", bias, f"must be one of {', '.join(BIASES)}")
    for name in ("use_rslora", "fan_in_fan_out", "lora_bias"):
        check(isinstance(getattr(config, name), bool), name, getattr(config, name), "must be True or False")
    begin = config.init_lora_weights
    check(
        begin is None or isinstance(begin, bool) or (isinstance(begin, str) and begin != ""),
        "init_lora_weights", begin, "must be True, False, or the name of one of PEFT's initializations",
    )  # fmt: skip
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, name)
        named = isinstance(pattern, Mapping) and all(isinstance(key, str) for key in pattern)
        check(named, name, pattern, "must be a dictionary from patterns of module names to numbers")
    for key, rank in config.rank_pattern.items():
        check_integer(f"rank_pattern[{key!r}]", rank, 1)
        check(rank <= MOST_RANKS, f"rank_pattern[{key!r}]", rank, f"must be at most {MOST_RANKS}")
    for key, alpha in config.alpha_pattern.items():
        check(is_positive(alpha), f"alpha_pattern[{key!r}]", alpha, "must be a positive number")


def _is_names(value: Any) -> bool:
    """Whether a value is None, a string, or a collection of strings."""
    several = isinstance(value, Collection) and not isinstance(value, (bytes, Mapping))
    return value is None or isinstance(value, str) or (several and all(isinstance(name, str) for name in value))
