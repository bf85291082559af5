"""Decoders, by their tensor-parallel plan or the table: the fast execution equals the reference."""

import contextlib
import copy

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from d2ft_peft import partition_model
from d2ft_peft.engine import compile_plan, get_runtime
from tests.reference import reference_forward
from tests.tuners.test_equality import d2ft_model, gradients, plain_twin, random_rows, step


DENSE = (
    "apertus", "arcee", "beam", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text",
    "glm", "glm4", "granite", "granite_swa", "helium", "hunyuan_v1_dense", "hyperclovax", "internlm3", "iquestcoder",
    "jais2", "lfm2", "llama", "minicpm3", "ministral", "ministral3", "mistral", "nanochat", "nemotron", "olmo",
    "olmo2", "olmo3", "olmo_hybrid", "phi", "phi3", "qwen2", "qwen3", "qwen3_5_text", "seed_oss", "smollm3",
    "stablelm", "starcoder2", "vaultgemma", "youtu",
)  # fmt: skip
# Attention is cut, the experts always run.
EXPERTS = (
    "afmoe", "aria_text", "axk1", "bamba", "cohere2_moe", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "glm4_moe", "glm4_moe_lite", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe", "hy_v3", "jamba", "laguna", "llama4_text", "mimo_v2_flash", "minimax", "minimax_m2", "mixtral",
    "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_5_moe_text", "qwen3_next", "solar_open",
)  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
    "v_head_dim": 8, "head_dim": None, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16, "num_hidden_layers": 4,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "attn_layer_indices": [1],
}  # fmt: skip
# What else a family needs.
OTHERS = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("olmo_hybrid", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), LINEAR),
    "bamba": MAMBA,
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention", "mamba"], "head_dim": None},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False,
        "head_dim": None,
    },
}  # fmt: skip
TINY_DECODER = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48,
    "moe_intermediate_size": 16, "num_hidden_layers": 3, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 64, "attention_dropout": 0.0, "residual_dropout": 0.0,
}  # fmt: skip
TOLERANCE = {"rtol": 1e-6, "atol": 1e-7}


def build(model_type: str, dtype: torch.dtype):
    torch.manual_seed(0)
    kwargs = {**TINY_DECODER, **OTHERS.get(model_type, {})}
    config = CONFIG_MAPPING[model_type](**{name: value for name, value in kwargs.items() if value is not None})
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](copy.deepcopy(config)).to(dtype)
    with contextlib.suppress(ValueError):  # products of groups know no float64; some have no choice
        model.set_experts_implementation("eager")
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", DENSE + EXPERTS)
def test_decoder_equals_the_reference(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    model = build(model_type, torch.float64)
    partition = partition_model(model)
    assert {branch.name for branch in partition.branches} >= ({"attention"} if model_type in EXPERTS else {"ffn"})
    ours = d2ft_model(model, "full", True).train()
    twin = plain_twin(model, "full", True).train()
    for path in [name for name, p in twin.named_parameters() if name.endswith((".sinks", "gate_bias"))]:
        twin.get_parameter(path).requires_grad_(False)
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    for row in random_rows(partition, seed=0, n=2):
        with reference_forward(twin, partition, row):
            expected = step(twin, batch)
        with get_runtime(ours).use(compile_plan(partition, row)):
            outputs = step(ours, batch)
        torch.testing.assert_close(outputs.logits, expected.logits, **TOLERANCE)
        actual = gradients(ours, "full")
        for name, gradient in gradients(twin, "full").items():
            torch.testing.assert_close(actual[name], gradient, **TOLERANCE)
