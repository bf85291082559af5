"""Where encoder-decoders keep their two stacks: one row for each way in which transformers writes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .architecture import Architecture, BranchSpec, register_architecture


def _self_and_cross(attention: BranchSpec, path: str) -> BranchSpec:
    """The same kind of attention at another path, whose keys and values come from the encoder."""

    def moved(name: str) -> str:
        return path + name.removeprefix(attention.region)

    columns = tuple(moved(name) for name in attention.columns)
    return replace(attention, region=path, columns=columns, row=moved(attention.row), other_input=columns[1:])


_SEPARATE = BranchSpec("self_attn", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj")
# What of an attention module counts heads, or their features.
_SCALED = {"whisper": ("num_heads",), "mvp": ("num_heads", "embed_dim")}


def _bart(config: Any) -> tuple[Architecture, ...]:
    """BART and what was copied from it: ``fc1``, the activation and ``fc2`` stand in the block itself."""
    ffn = BranchSpec("fc1", ("fc1",), "fc2", joined=True)
    scaled = _SCALED.get(config.model_type, ())
    attention = replace(_SEPARATE, scaled_attributes=scaled)
    cross = _self_and_cross(attention, "encoder_attn")
    return Architecture("encoder.layers", attention, ffn), Architecture("decoder.layers", attention, ffn, cross)


def _t5(config: Any) -> tuple[Architecture, ...]:
    """T5: the first block makes a position bias per head, which every block hands on to the next."""
    return _t5_stacks(config, position_bias={"hands_on": "position_bias", "per_head": (("position_bias", 1),)})


def _umt5(config: Any) -> tuple[Architecture, ...]:
    """UMT5: every block makes its own."""
    return _t5_stacks(config, position_bias={"per_head": (("relative_attention_bias", 2),)})


def _switch(config: Any) -> tuple[Architecture, ...]:
    """Switch transformers: T5 whose feed-forward networks are experts in some blocks; all of them run whole."""
    return tuple(replace(stack, ffn=None) for stack in _t5(config))


def _t5_stacks(config: Any, position_bias: dict[str, Any]) -> tuple[Architecture, ...]:
    path = "layer.0.SelfAttention"
    attention = BranchSpec(
        path, (f"{path}.q", f"{path}.k", f"{path}.v"), f"{path}.o", scaled_attributes=("n_heads",), **position_bias
    )
    cross = _self_and_cross(attention, "layer.1.EncDecAttention")
    if not attention.hands_on:
        cross = replace(cross, per_head=())
    columns = ("wi_0", "wi_1") if getattr(config, "is_gated_act", False) else ("wi",)

    def ffn(layer: int) -> BranchSpec:
        path = f"layer.{layer}.DenseReluDense"
        return BranchSpec(path, tuple(f"{path}.{name}" for name in columns), f"{path}.wo")

    return Architecture("encoder.block", attention, ffn(1)), Architecture("decoder.block", attention, ffn(2), cross)


for _model_type in (
    "bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "mvp", "pegasus", "plbart",
    "speech_to_text", "whisper",
):  # fmt: skip
    register_architecture(_model_type, _bart)
for _model_type, _stacks in {
    "t5": _t5, "mt5": _t5, "umt5": _umt5, "switch_transformers": _switch,
}.items():  # fmt: skip
    register_architecture(_model_type, _stacks)
