"""Which models can be cut: outputs, gradients and what is generated are those of the whole model, or it is refused."""

import functools

import pytest
import torch
import transformers as tf

from d2ft_peft.dlora import BaseModel, connect

from .cases import adapter, check_close, edge_like, serve, step, whole


TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 3}
NEW = {**SIZE, **TEXT, "num_key_value_heads": 2, "max_position_embeddings": 64}
NARROW = {**NEW, "head_dim": 8, "sliding_window": 3}
OLD = {
    **TEXT, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_inner": 48, "n_positions": 64, "rotary_dim": 4,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 5}
ENCODER = {**SIZE, **TEXT, **STILL, "max_position_embeddings": 64}
IMAGE = {**SIZE, **STILL, "image_size": 16, "patch_size": 8}
ATTENTION = r".*(q_proj|k_proj|v_proj|o_proj)"
EXPERTS = {**NEW, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

DECODERS = {
    "Mistral": {**NEW, "sliding_window": 3},
    "Gemma2": NARROW,
    "Gemma3": {**NARROW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "Phi3": {**NEW, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "GPTNeoX": {**SIZE, **TEXT, "max_position_embeddings": 64},
    "OPT": {**TEXT, "hidden_size": 32, "word_embed_proj_dim": 16, "num_attention_heads": 4, "ffn_dim": 48,
            "num_hidden_layers": 3, "dropout": 0.0, "max_position_embeddings": 64, "do_layer_norm_before": False},
    "Falcon": {**TEXT, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3},
    "Bloom": {**TEXT, "hidden_size": 32, "n_head": 4, "n_layer": 3},
    "Qwen3Moe": EXPERTS,
}  # fmt: skip
MORE_DECODERS = {
    "Apertus": NEW, "Arcee": NEW, "BioGpt": {**ENCODER, "activation_dropout": 0.0}, "BitNet": NEW, "CTRL":
    {**OLD, "dff": 48}, "CodeGen": OLD, "Cohere": NEW, "Cohere2": {**NEW, "sliding_window": 3},
    "DeepseekV3": {**NEW, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
                   "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
                   "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
    "DiffLlama": NEW, "Ernie4_5": {**NEW, "head_dim": 8}, "Exaone4": {**NEW, "sliding_window": 3}, "GPT2": OLD,
    "GPTBigCode": OLD, "GPTJ": OLD,
    "GPTNeo": {**TEXT, "hidden_size": 32, "num_heads": 4, "num_layers": 2, "window_size": 3,
               "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64},
    "Gemma": {**NEW, "head_dim": 8}, "Glm": {**NEW, "head_dim": 8}, "Glm4": {**NEW, "head_dim": 8},
    "GptOss": {**NARROW, "num_local_experts": 4, "num_experts_per_tok": 2}, "Granite": {**NEW, "logits_scaling": 3.0},
    "Helium": {**NEW, "head_dim": 8}, "Llama": NEW,
    "Llama4": {**NEW, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size_mlp": 48,
               "attention_chunk_size": 3, "interleave_moe_layer_step": 2},
    "MiniCPM3": {**NEW, "num_key_value_heads": 4}, "Mixtral": {**NEW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "vocab_size": 64, "pad_token_id": 0},
    "Nemotron": NEW, "Olmo2": NEW, "Olmo3": {**NEW, "sliding_window": 3},
    "Olmoe": {**NEW, "num_experts": 4, "num_experts_per_tok": 2}, "Persimmon": {**SIZE, **TEXT},
    "Phi": {**NEW, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "Qwen2": {**NEW, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "Qwen3": {**NEW, "head_dim": 8}, "SmolLM3": NEW, "StableLm": NEW,
    "Starcoder2": {**NEW, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "XGLM": {**TEXT, "d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 48, "dropout": 0.0,
             "attention_dropout": 0.0, "activation_dropout": 0.0, "max_position_embeddings": 64},
}  # fmt: skip
ENCODERS = {
    "Roberta": ENCODER,
    "DistilBert": {**TEXT, "dim": 32, "n_heads": 4, "n_layers": 3, "hidden_dim": 48, "dropout": 0.0, "num_labels": 5,
                   "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "max_position_embeddings": 64},
    "ModernBert": {**SIZE, **TEXT, "num_labels": 5, "local_attention": 4, "global_attn_every_n_layers": 2,
                   "cls_token_id": 1, "sep_token_id": 2},
    "Electra": {**ENCODER, "embedding_size": 16},
    "MPNet": ENCODER,
}  # fmt: skip
MORE_ENCODERS = {
    "BigBird": {**ENCODER, "attention_type": "original_full"}, "Camembert": ENCODER, "Ernie": ENCODER,
    "EuroBert": {**NEW, "num_labels": 5}, "XLMRoberta": ENCODER,
}  # fmt: skip
VISION = {"Dinov2": IMAGE, "DeiT": IMAGE}
MORE_VISION = {
    "Beit": {**IMAGE, "use_shared_relative_position_bias": True}, "Data2VecVision": IMAGE, "IJepa": IMAGE,
    "Dinov2WithRegisters": IMAGE, "ViTMSN": IMAGE,
}  # fmt: skip
IN_FLOAT32 = ("Qwen3Moe", "Mixtral", "Olmoe", "GptOss", "DeepseekV3", "XGLM")
"""Whose experts, or masks, are computed in 32 bits only."""
TEXT_CONFIGS = {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig", "Gemma3n": "Gemma3nTextConfig"}


def slow(names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def saved(name, ending, options, folder):
    """A tiny model's checkpoint, its class and its type of numbers."""
    torch.manual_seed(0)
    model_class = getattr(tf, name + ending, None) or getattr(tf, f"{name}LMHeadModel")
    model = model_class(getattr(tf, TEXT_CONFIGS.get(name, f"{name}Config"))(**options))
    for parameter in model.parameters():
        if parameter.ndim == 1 or name in ("GptOss", "Llama4"):  # those leave weights of experts as memory was
            parameter.data.normal_(0.5 if parameter.ndim == 1 else 0.0, 0.2)
    dtype = torch.float32 if name in IN_FLOAT32 else torch.float64
    model.to(dtype).save_pretrained(folder)
    return str(folder), model_class, dtype


def texts(labels, padded="right"):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 5:] = 0
    ids, mask = (ids, mask) if padded == "right" else (ids.flip(1), mask.flip(1))
    ids = ids.masked_fill(mask == 0, 0)
    batch = {"input_ids": ids, "attention_mask": mask}
    if labels is not None:
        batch["labels"] = ids.masked_fill(mask == 0, -100) if labels == "tokens" else torch.tensor([0, 3, 4])
    return batch


def images():
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 3, 4])}


def check_alike(edge, local, batch, dtype):
    """Gradients in eval mode, since frozen blocks in the cloud run without dropout."""
    loss, grads = step(local, batch)
    found, edge_grads = step(edge, batch)
    torch.testing.assert_close(found, loss)
    check_close(edge_grads, grads, 1e-9 if dtype is torch.float64 else 1e-4)


@pytest.mark.quick(1)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*DECODERS, *slow(MORE_DECODERS)])
def test_decoders(tmp_path, name):
    options = {**DECODERS, **MORE_DECODERS}[name]
    base, model_class, dtype = saved(name, "ForCausalLM", options, tmp_path)
    few = name in IN_FLOAT32 + ("Llama4",) and name != "XGLM"
    targets = r".*self_attn\.(q|k|v|o|q_a|q_b|kv_b)_proj" if few else "all-linear"
    config = functools.partial(adapter, target_modules=targets)
    local = whole(base, config(), model_class, dtype).eval()
    with serve(base, dtype) as (_, address):
        edge = edge_like(local, address, base, config(), dtype, model_class=model_class, edge_blocks=(1, 0)).eval()
        check_alike(edge, local, texts("tokens"), dtype)
        if name not in ("Bloom", "Mpt", "Gemma2"):  # rows of padding alone are NaN in one place as well
            check_alike(edge, local, texts("tokens", "left"), dtype)
        for how in ({"do_sample": False}, {"num_beams": 2}):
            prompt = {**texts(None, "left"), "max_new_tokens": 5, "min_new_tokens": 5, **how}
            assert torch.equal(edge.generate(**prompt), local.generate(**prompt))


@pytest.mark.quick(3)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*ENCODERS, *slow(MORE_ENCODERS), *VISION, *slow(MORE_VISION)])
def test_encoders(tmp_path, name):
    of_images = {**VISION, **MORE_VISION}
    ending = "ForImageClassification" if name in of_images else "ForSequenceClassification"
    options = {**ENCODERS, **MORE_ENCODERS, **of_images}[name]
    base, model_class, dtype = saved(name, ending, options, tmp_path)
    local = whole(base, adapter(), model_class, dtype).eval()
    with serve(base, dtype) as (_, address):
        edge = edge_like(local, address, base, adapter(), dtype, model_class=model_class, edge_blocks=(1, 1)).eval()
        for batch in [images()] if name in of_images else [texts("row"), texts("row", "left")]:
            check_alike(edge, local, batch, dtype)


REFUSED = {
    "inputs of single layers": ("Gemma3n", "ForCausalLM", {
        **NARROW, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
        "laurel_rank": 4, "altup_num_inputs": 2, "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    }, "does not run from hidden states alone"),
    "states that are no keys and values": ("Lfm2", "ForCausalLM", {
        **NEW, "layer_types": ["conv", "full_attention", "conv"]}, "recurrent blocks"),
    "blocks that answer in pairs": ("DebertaV2", "ForSequenceClassification", {
        **ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
    }, "does not run from hidden states alone"),
    "a position bias handed on": ("T5", "EncoderModel", {
        "d_model": 32, "num_layers": 3, "num_heads": 4, "d_kv": 8, "d_ff": 48, **TEXT}, "DLoRA cannot cut it"),
    "two stacks": ("Bart", "ForConditionalGeneration", {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_attention_heads": 4, "decoder_ffn_dim": 48, **TEXT}, "has an encoder and a decoder"),
    "one block used again": ("Albert", "ForSequenceClassification", {**ENCODER, "embedding_size": 16}, "0 stacks of 3"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "ending", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_models_that_cannot_be_cut_are_refused_when_a_server_starts(tmp_path, name, ending, options, message):
    base, _, dtype = saved(name, ending, options, tmp_path)
    with pytest.raises(ValueError, match=message):
        BaseModel.load(base, dtype)


def test_a_projection_that_runs_twice_in_a_block_cannot_have_an_adapter(tmp_path):
    options = {**ENCODER, "attention_window": 4}
    base, model_class, dtype = saved("Longformer", "ForSequenceClassification", options, tmp_path)
    with serve(base, dtype) as (_, address), pytest.raises(RuntimeError, match="query_global' is no projection"):
        connect(address, base, adapter(), dtype=dtype, model_class=model_class)
