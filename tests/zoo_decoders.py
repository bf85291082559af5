"""Tiny decoders of many families: fused projections, tensors per head, latents, experts, hybrids."""

from __future__ import annotations

import transformers as tf

from tests.models import Tiny


_TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_HEADS = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
_GROUPS = {**_HEADS, "num_key_value_heads": 2}
_GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_inner": 48, "n_positions": 16, "rotary_dim": 4}
_NO_DROPOUT = {
    "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "dropout": 0.0, "activation_dropout": 0.0, "resid_dropout": 0.0, "embed_dropout": 0.0, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip
_LATENT = {
    **_HEADS, "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6, "v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip


def _tiny(family: str, model: str, **kwargs) -> Tiny:
    return Tiny(getattr(tf, f"{family}Config"), getattr(tf, model), {**_TEXT, **kwargs}, "causal")


def _lm(family: str, *configs: dict, **kwargs) -> Tiny:
    merged = {name: value for config in (_NO_DROPOUT, *configs) for name, value in config.items()}
    return _tiny(family, f"{family}ForCausalLM", **{**merged, **kwargs})


# Under multi-query attention a block is one head, which runs as a whole or not.
DECODERS = {
    "gpt_neox": _lm("GPTNeoX", _HEADS, max_position_embeddings=32),
    "gpt_neox, one after the other": _lm("GPTNeoX", _HEADS, max_position_embeddings=32, use_parallel_residual=False),
    "gptj": _lm("GPTJ", _GPT),
    "gpt_neo": _lm(
        "GPTNeo", _HEADS, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4,
        max_position_embeddings=32,
    ),
    "codegen": _lm("CodeGen", _GPT, n_head=8, n_ctx=16),
    "ctrl": _tiny(
        "CTRL", "CTRLLMHeadModel", n_embd=32, n_head=4, n_layer=2, dff=48, n_positions=16, resid_pdrop=0.0,
        embd_pdrop=0.0,
    ),
    "imagegpt": _tiny(
        "ImageGPT", "ImageGPTForCausalImageModeling", n_embd=32, n_head=4, n_layer=2, n_inner=48, n_positions=16,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    ),
    "opt": _lm("OPT", _HEADS, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32),
    "xglm": _lm("XGLM", d_model=32, attention_heads=4, ffn_dim=48, num_layers=2, max_position_embeddings=32),
    "biogpt": _lm("BioGpt", _HEADS, max_position_embeddings=32),
    "bloom": _lm("Bloom", n_head=4, n_layer=2, hidden_size=32),
    "bloom, residual after the norm": _lm(
        "Bloom", n_head=4, n_layer=2, hidden_size=32, apply_residual_connection_post_layernorm=True,
    ),
    "falcon": _lm("Falcon", _HEADS, num_kv_heads=2, new_decoder_architecture=True, bias=True),
    "falcon, alibi": _lm(
        "Falcon", _HEADS, multi_query=False, alibi=True, new_decoder_architecture=False, parallel_attn=False, bias=True,
    ),
    "falcon, multi-query": _lm("Falcon", _HEADS, multi_query=True, new_decoder_architecture=False, bias=True),
    "mpt": _lm("Mpt", d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=32),
    "phi": _lm("Phi", _GROUPS, qk_layernorm=True),
    "phi3": _lm("Phi3", _GROUPS),
    "glm4": _lm("Glm4", _GROUPS, head_dim=8),
    "stablelm": _lm("StableLm", _GROUPS, qk_layernorm=True, use_qkv_bias=True),
    "persimmon": _lm("Persimmon", _HEADS, qk_layernorm=True),
    "gpt_bigcode": _lm("GPTBigCode", _GPT, multi_query=False),
    "gpt_bigcode, multi-query": _lm("GPTBigCode", _GPT, multi_query=True),
    "olmo2": _lm("Olmo2", _GROUPS),
    "olmo3": _lm("Olmo3", _GROUPS, sliding_window=4),
    "olmoe": _lm("Olmoe", _GROUPS, num_experts=4, num_experts_per_tok=2, clip_qkv=1.0),
    "gpt_oss": _lm("GptOss", _GROUPS, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
    "mixtral": _lm("Mixtral", _GROUPS, num_local_experts=4, num_experts_per_tok=2),
    "llama4": _tiny("Llama4Text", "Llama4ForCausalLM", **_GROUPS, head_dim=8, intermediate_size_mlp=64,
                    num_local_experts=4, interleave_moe_layer_step=2, attention_dropout=0.0),
    "deepseek_v2": _lm("DeepseekV2", _LATENT),
    "deepseek_v3": _lm("DeepseekV3", _LATENT),
    "deepseek_v3, queries without latents": _lm("DeepseekV3", _LATENT, q_lora_rank=None),
    "minicpm3": _lm("MiniCPM3", _LATENT),
    "mimo_v2_flash": _lm(
        "MiMoV2Flash", _GROUPS, head_dim=12, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, moe_intermediate_size=16,
    ),
    "qwen3_5": _tiny(
        "Qwen3_5Text", "Qwen3_5ForCausalLM", **{**_GROUPS, "num_hidden_layers": 4}, head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    ),
    "jamba": _lm(
        "Jamba", _GROUPS, num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, use_mamba_kernels=False, mamba_d_state=4,
    ),
    "qwen3_next": _lm(
        "Qwen3Next", _GROUPS, head_dim=8, num_hidden_layers=4, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=8, mlp_only_layers=[0, 3],
    ),
}  # fmt: skip
