"""Decoders whose heads no tensor-parallel plan tells: fused projections, tensors per head, latents."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, BranchSpec, register_architecture


_LLAMA_FFN = BranchSpec("mlp", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
_NEOX_FFN = BranchSpec("mlp", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")
_FUSED_FFN = BranchSpec("mlp", ("mlp.gate_up_proj",), "mlp.down_proj", parts=2)
# The block itself puts the activation between the two.
_BLOCK_FFN = BranchSpec("fc1", ("fc1",), "fc2", joined=True)
_GPTJ_FFN = BranchSpec("mlp", ("mlp.fc_in",), "mlp.fc_out")


def _separate(region: str, row: str, **kwargs: Any) -> BranchSpec:
    return BranchSpec(region, tuple(f"{region}.{name}_proj" for name in "qkv"), f"{region}.{row}", **kwargs)


def _fused(region: str, column: str, row: str, **kwargs: Any) -> BranchSpec:
    return BranchSpec(region, (f"{region}.{column}",), f"{region}.{row}", **kwargs)


_GPT_NEOX = Architecture("layers", _fused("attention", "query_key_value", "dense", interleaved=True), _NEOX_FFN)
_PERSIMMON = Architecture(
    "layers",
    _fused("self_attn", "query_key_value", "dense", interleaved=True, scaled_attributes=("num_heads",)),
    _NEOX_FFN,
)
_BLOOM = Architecture(
    "h",
    _fused(
        "self_attention", "query_key_value", "dense", interleaved=True, scaled_attributes=("num_heads",),
        per_head=(("alibi", 0),), residual="residual",
    ),
    BranchSpec("mlp", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", residual="residual"),
)  # fmt: skip
# Under SDPA the mask holds the ALiBi bias of every head. Keys and values are grouped with their queries.
_FALCON = Architecture(
    "h",
    _fused(
        "self_attention", "query_key_value", "dense", interleaved=True, scaled_attributes=("num_heads", "num_kv_heads"),
        per_head=(("alibi", 1), ("attention_mask", 1)),
    ),
    _NEOX_FFN,
)  # fmt: skip
_MPT = Architecture(
    "blocks",
    _fused("attn", "Wqkv", "out_proj", parts=3, scaled_attributes=("n_heads",), per_head=(("position_bias", 0),)),
    BranchSpec("ffn", ("ffn.up_proj",), "ffn.down_proj", residual="residual"),
)
_PHI3 = Architecture(
    "layers",
    _fused(
        "self_attn", "qkv_proj", "o_proj", parts=3,
        scaled_attributes=("num_key_value_heads", "config.num_attention_heads"),
    ),
    _FUSED_FFN,
)  # fmt: skip
_GPT_BIGCODE = Architecture(
    "h",
    _fused("attn", "c_attn", "c_proj", interleaved=True, scaled_attributes=("num_heads",)),
    BranchSpec("mlp", ("mlp.c_fc",), "mlp.c_proj"),
)
# Its heads lie in four groups, which its code fixes: a head that can be left out is one of each.
_CODEGEN = Architecture(
    "h",
    _fused("attn", "qkv_proj", "out_proj", parts=3, repeats=4, scaled_attributes=("num_attention_heads",)),
    _GPTJ_FFN,
)
_CTRL = Architecture(
    "h",
    BranchSpec(
        "multi_head_attention",
        ("multi_head_attention.Wq", "multi_head_attention.Wk", "multi_head_attention.Wv"),
        "multi_head_attention.dense",
        scaled_attributes=("num_heads", "d_model_size"),
    ),
    BranchSpec("ffn", ("ffn.0",), "ffn.2"),
)
_IMAGEGPT = Architecture(
    "h",
    _fused("attn", "c_attn", "c_proj", parts=3, scaled_attributes=("split_size", "num_heads")),
    BranchSpec("mlp", ("mlp.c_fc",), "mlp.c_proj"),
)
_GPTJ = Architecture("h", _separate("attn", "out_proj", scaled_attributes=("num_attention_heads",)), _GPTJ_FFN)
_GPT_NEO = Architecture(
    "h",
    _separate("attn.attention", "out_proj", scaled_attributes=("num_heads",)),
    BranchSpec("mlp", ("mlp.c_fc",), "mlp.c_proj"),
)
_STABLELM = Architecture(
    "layers",
    _separate(
        "self_attn", "o_proj", scaled_attributes=("num_heads", "num_key_value_heads"),
        per_head=(("q_layernorm.norms", 0), ("k_layernorm.norms", 0)),
    ),
    _LLAMA_FFN,
)  # fmt: skip
# Their blocks keep the FFN in their own forward: it always runs.
_OPT = Architecture("decoder.layers", _separate("self_attn", "out_proj", scaled_attributes=("num_heads",)), _BLOCK_FFN)
_XGLM = Architecture(
    "layers", _separate("self_attn", "out_proj", scaled_attributes=("num_heads", "embed_dim")), _BLOCK_FFN
)
_BIOGPT = Architecture("layers", _separate("self_attn", "out_proj"), _BLOCK_FFN)
_GPT_OSS = Architecture("layers", _separate("self_attn", "o_proj", per_head=(("sinks", 0),)), None)


# Mixtures of experts and hybrids whose plan says nothing of attention; blocks without it run whole.
_ATTENTION = Architecture("layers", _separate("self_attn", "o_proj"), None)
_HYBRID = Architecture(
    "layers",
    _separate("self_attn", "o_proj"),
    BranchSpec("feed_forward", ("feed_forward.gate_proj", "feed_forward.up_proj"), "feed_forward.down_proj"),
)


def _latent(config: Any) -> Architecture:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): heads own rows of the up-projections.

    The latents, and the positions that all heads share, are computed whole whenever a head runs.
    """
    from_latent = getattr(config, "q_lora_rank", None) is not None
    whole = ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
    attention = BranchSpec(
        "self_attn",
        ("self_attn.q_b_proj" if from_latent else "self_attn.q_proj", "self_attn.kv_b_proj"),
        "self_attn.o_proj",
        whole=whole if from_latent else whole[1:],
        shared_input=False,
    )
    return Architecture("layers", attention, _LLAMA_FFN)


_DECODERS = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), _latent),
    **dict.fromkeys(("granitemoe", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "phimoe"), _ATTENTION),
    **dict.fromkeys(("bamba", "jamba"), _HYBRID),
    "biogpt": _BIOGPT,
    "bloom": _BLOOM,
    "codegen": _CODEGEN,
    "ctrl": _CTRL,
    "falcon": _FALCON,
    "gpt_bigcode": _GPT_BIGCODE,
    "gpt_neo": _GPT_NEO,
    "gpt_neox": _GPT_NEOX,
    "gpt_oss": _GPT_OSS,
    "gptj": _GPTJ,
    "imagegpt": _IMAGEGPT,
    "mpt": _MPT,
    "opt": _OPT,
    "persimmon": _PERSIMMON,
    "phi3": _PHI3,
    "stablelm": _STABLELM,
    "xglm": _XGLM,
}
for _model_type, _architecture in _DECODERS.items():
    register_architecture(_model_type, _architecture)
