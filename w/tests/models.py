"""Tiny models of every supported architecture, with a batch for each. Built from configs: nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers as tf
from torch import nn


@dataclass(frozen=True)
class Tiny:
    """A recipe: config, model class, and what one batch of `n` samples looks like."""

    config: type
    model: type
    kwargs: dict
    kind: str = "text"

    def build(self, seed: int = 0, **overrides) -> nn.Module:
        torch.manual_seed(seed)
        model = self.model(self.config(**{**self.kwargs, **overrides}))
        # Biases start at zero and norms at one: move them, or a wrong bias would not show.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
        return model

    def batch(self, n: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "image":
            pixels = torch.randn(n, 3, 16, 16, generator=generator)
            return {"pixel_values": pixels, "labels": torch.randint(5, (n,), generator=generator)}
        ids = torch.randint(3, 60, (n, 7), generator=generator)
        labels = ids.clone() if self.kind == "causal" else torch.randint(5, (n,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


_TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 3}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

TINY = {
    "vit": Tiny(
        tf.ViTConfig, tf.ViTForImageClassification,
        {**_BASE, **_NO_DROPOUT, "image_size": 16, "patch_size": 8, "num_labels": 5}, "image",
    ),
    "bert": Tiny(
        tf.BertConfig, tf.BertForSequenceClassification, {**_BASE, **_TEXT, **_NO_DROPOUT, "num_labels": 5},
    ),
    "llama": Tiny(tf.LlamaConfig, tf.LlamaForCausalLM, {**_BASE, **_TEXT, "num_key_value_heads": 2}, "causal"),
    "qwen3": Tiny(
        tf.Qwen3Config, tf.Qwen3ForCausalLM, {**_BASE, **_TEXT, "num_key_value_heads": 2, "head_dim": 8}, "causal",
    ),
    "gpt2": Tiny(
        tf.GPT2Config, tf.GPT2LMHeadModel,
        {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_inner": 48, "n_positions": 16, "attn_pdrop": 0.0,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, **_TEXT}, "causal",
    ),
}  # fmt: skip
