"""Where encoder-decoders keep their two stacks: one row for each way in which transformers writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .architecture import Architecture, BranchSpec


def _self_and_cross(attention: BranchSpec, path: str) -> BranchSpec:
    """The same kind of attention at another path, whose keys and values come from the encoder."""

    def moved(name: str) -> str:
        return path + name.removeprefix(attention.region)

    columns = tuple(moved(name) for name in attention.columns)
    return replace(attention, region=path, columns=columns, row=moved(attention.row), other_input=columns[1:])


def _bart(config: Any) -> tuple[Architecture, ...]:
    """BART and what was copied from it: ``fc1``, the activation and ``fc2`` stand in the block itself."""
    attention = BranchSpec(
        "self_attn", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj"
    )
    if config.model_type == "whisper":
        attention = replace(attention, scaled_attributes=("num_heads",))
    cross = _self_and_cross(attention, "encoder_attn")
    return Architecture("encoder.layers", attention, None), Architecture("decoder.layers", attention, None, cross)


_LIKE_BART = (
    "bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "pegasus", "plbart", "speech_to_text",
    "whisper",
)  # fmt: skip

_ENCODER_DECODERS: dict[str, Callable[[Any], tuple[Architecture, ...]]] = {
    **dict.fromkeys(_LIKE_BART, _bart),
}  # fmt: skip
"""The stacks of a model, encoder first, by its model type."""


def encoder_decoder(config: Any) -> tuple[Architecture, ...] | None:
    """The stacks of an encoder-decoder that stands in the table, or None."""
    make = _ENCODER_DECODERS.get(getattr(config, "model_type", None))
    return None if make is None else make(config)
