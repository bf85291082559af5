"""Every decoder whose tensor-parallel plan D2FT reads: the fast execution equals the reference."""

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
    "apertus", "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "granite",
    "helium", "hyperclovax", "internlm3", "jais2", "llama", "ministral", "mistral", "nanochat", "nemotron", "olmo",
    "phi", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2", "vaultgemma",
)  # fmt: skip
# Attention is cut, the experts always run; grouped matrix products have no float64.
EXPERTS = ("ernie4_5_moe", "exaone_moe", "glm4_moe", "llama4_text", "mixtral", "qwen2_moe", "qwen3_moe", "solar_open")
TINY_DECODER = {
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48,
    "moe_intermediate_size": 16, "num_hidden_layers": 3, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 64, "attention_dropout": 0.0, "residual_dropout": 0.0,
}  # fmt: skip
TOLERANCE = {torch.float64: {"rtol": 1e-7, "atol": 1e-7}, torch.float32: {"rtol": 1e-2, "atol": 1e-4}}


def build(model_type: str, dtype: torch.dtype):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**TINY_DECODER)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](copy.deepcopy(config)).to(dtype)
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
    dtype = torch.float32 if model_type in EXPERTS else torch.float64
    model = build(model_type, dtype)
    partition = partition_model(model)
    assert {branch.name for branch in partition.branches} >= ({"attention"} if model_type in EXPERTS else {"ffn"})
    twin = plain_twin(model, "full", True).train()
    ours = d2ft_model(model, "full", True).train()
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    for row in random_rows(partition, seed=0, n=2):
        with reference_forward(twin, partition, row):
            expected = step(twin, batch)
        with get_runtime(ours).use(compile_plan(partition, row)):
            outputs = step(ours, batch)
        torch.testing.assert_close(outputs.logits, expected.logits, **TOLERANCE[dtype])
        actual = gradients(ours, "full")
        for name, gradient in gradients(twin, "full").items():
            torch.testing.assert_close(actual[name], gradient, **TOLERANCE[dtype])
