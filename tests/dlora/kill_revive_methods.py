"""PEFT methods of every kind on tiny models: whose modules can be killed one by one, and which are refused."""

from __future__ import annotations

import warnings
from functools import partial

import peft
import torch
from peft import get_peft_model
from torch import nn

from d2ft_peft import D2FTConfig
from tests.models import TINY


LLAMA = ["q_proj", "v_proj", "down_proj"]


def lora(**kwargs) -> partial:
    return partial(peft.LoraConfig, **{"r": 4, "target_modules": LLAMA, **kwargs})


def on_projections(config, **kwargs) -> partial:
    return partial(config, target_modules=LLAMA, **kwargs)


WORKS = {
    "LoRA": lora(),
    "rsLoRA": lora(use_rslora=True),
    "DoRA": lora(use_dora=True),
    "PiSSA": lora(init_lora_weights="pissa"),
    "OLoRA": lora(init_lora_weights="olora"),
    "LoRA with a bias in B": lora(lora_bias=True),
    "LoRA and dropout": lora(lora_dropout=0.3),
    "LoRA on embeddings": lora(target_modules=[*LLAMA, "embed_tokens"]),
    "LoRA on parameters": lora(target_modules=[], target_parameters=["q_proj.weight", "v_proj.weight"]),
    "LoRA and trainable tokens": lora(trainable_token_indices=[3, 4]),
    "LoRA and modules_to_save": lora(modules_to_save=["lm_head"]),
    "LoRA and all biases": lora(bias="all"),
    "AdaMSS": on_projections(peft.AdamssConfig, r=4),
    "BEFT": on_projections(peft.BeftConfig),
    "BOFT": on_projections(peft.BOFTConfig, boft_block_size=8),
    "C3A": on_projections(peft.C3AConfig, block_size=16),
    "DEFT": on_projections(peft.DeftConfig, r=4),
    "DeLoRA": on_projections(peft.DeloraConfig, r=4),
    "FourierFT": on_projections(peft.FourierFTConfig, n_frequency=20),
    "FRoD": on_projections(peft.FrodConfig),
    "GLoRA": on_projections(peft.GloraConfig),
    "GraLoRA": on_projections(peft.GraloraConfig, r=4, gralora_k=2),
    "HiRA": on_projections(peft.HiraConfig, r=4),
    "HRA": on_projections(peft.HRAConfig, r=4),
    "IA3": on_projections(peft.IA3Config, feedforward_modules=["down_proj"]),
    "LN tuning": partial(peft.LNTuningConfig, target_modules=["input_layernorm", "post_attention_layernorm"]),
    "LoHa": on_projections(peft.LoHaConfig, r=4),
    "LoKr": on_projections(peft.LoKrConfig, r=4),
    "MiSS": on_projections(peft.MissConfig, r=4),
    "OFT": on_projections(peft.OFTConfig, oft_block_size=8, use_cayley_neumann=False),
    "OSF": on_projections(peft.OSFConfig, effective_rank=8),
    "PEANuT": on_projections(peft.PeanutConfig, r=4),
    "Poly": on_projections(peft.PolyConfig, r=4, task_type="CAUSAL_LM"),
    "PSOFT": on_projections(peft.PsoftConfig, r=4),
    "PVeRA": on_projections(peft.PveraConfig, r=8),
    "RandLoRA": on_projections(peft.RandLoraConfig, r=4),
    "RoAd": on_projections(peft.RoadConfig, group_size=8),
    "ShadowPEFT": peft.ShadowConfig,
    "SHiRA": on_projections(peft.ShiraConfig, r=4),
    "Super-Tuning": on_projections(peft.SupertuningConfig),
    "VeRA": on_projections(peft.VeraConfig, r=8),
    "WaveFT": on_projections(peft.WaveFTConfig, n_frequency=20),
    "D2FT, full": partial(D2FTConfig, policy="all_full"),
    "D2FT, LoRA": partial(D2FTConfig, r=4, policy="all_full"),
}
"""Name -> configuration; all on the tiny Llama."""

REFUSED = {
    "AdaLoRA": (
        on_projections(peft.AdaLoraConfig, init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1),
        "AdaLoraModel cannot be killed in parts: after each step its update_and_allocate reads a gradient of every",
    ),
    "AdaMSS that allocates": (
        on_projections(peft.AdamssConfig, r=4, use_asa=True), "AdamssModel cannot be killed in parts",
    ),
    "Lily": (on_projections(peft.LilyConfig, r=4), "layers.0.self_attn.q_proj and .*layers.1.self_attn.q_proj share"),
    "VB-LoRA": (
        on_projections(peft.VBLoRAConfig, r=4, num_vectors=16, vector_length=8), "share a trainable parameter of shape",
    ),
    "Uni-LoRA": (on_projections(peft.UniLoraConfig, r=4), "neither can be killed without the other"),
    "TinyLoRA": (on_projections(peft.TinyLoraConfig, r=4), "neither can be killed without the other"),
    "D2FT on several processes": (
        partial(D2FTConfig, policy="all_full", head_parallel=True), "head_parallel=True puts the parts of a module on",
    ),
    "D2FT with tied embeddings": (
        partial(D2FTConfig, policy="all_full", train_boundary=True), "model.embed_tokens and lm_head share a trainable",
    ),
    "prompt tuning": (
        partial(peft.PromptTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=4),
        "PROMPT_TUNING puts no modules into layers that could be killed one by one",
    ),
    "prefix tuning": (
        partial(peft.PrefixTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=4), "PREFIX_TUNING puts no modules",
    ),
    "P-tuning": (
        partial(peft.PromptEncoderConfig, task_type="CAUSAL_LM", num_virtual_tokens=4), "P_TUNING puts no modules",
    ),
    "adaption prompt": (
        partial(peft.AdaptionPromptConfig, adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
        "ADAPTION_PROMPT puts no modules",
    ),
    "a frozen adapter": (lora(inference_mode=True), "no layer of the active adapter .LORA. has a trainable parameter"),
}  # fmt: skip
"""Name -> configuration, and what is said of it."""


def adapt(config, model: str = "llama", **overrides) -> nn.Module:
    """A tiny model with an adapter."""
    base = TINY[model].build(**overrides)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says of small or untied shapes
        return get_peft_model(base, config())


def batch(name: str = "", n: int = 3, seed: int = 1, model: str = "llama") -> dict[str, torch.Tensor]:
    """Samples, with labels that are ignored here and there; Poly asks for the task of each."""
    found = TINY[model].batch(n, seed)
    if model == "llama":
        found["labels"][0, :3] = -100
    if name == "Poly":
        found["task_ids"] = torch.zeros(n, dtype=torch.long)
    return found


def adam(model: nn.Module, **kwargs) -> torch.optim.Optimizer:
    """With weight decay and momentum, which move parameters whose gradient is zero."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, **{"lr": 1e-2, "weight_decay": 0.1, **kwargs})
