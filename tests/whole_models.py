"""Tiny models whose blocks cannot be cut into heads, with a batch for each, and the twin that runs their blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import transformers as tf
from torch import nn

from d2ft_peft.schedule import Operation
from tests.models import Tiny


class HandWrittenBlock(nn.Module):
    """Takes and returns tuples, and has a parameter of its own."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.mix = nn.MultiheadAttention(width, 2, batch_first=True)
        self.scale = nn.Parameter(torch.full((width,), 0.7))

    def forward(self, x, mask=None):
        y = self.norm(x)
        x = x + self.mix(y, y, y, need_weights=False)[0]
        return (x + self.scale * self.down(torch.relu(self.up(x))), mask)


class HandWritten(nn.Module):
    """A transformer in plain torch, without a config."""

    def __init__(self, width: int = 16, blocks: int = 3):
        super().__init__()
        self.embed, self.norm, self.score = nn.Embedding(64, width), nn.LayerNorm(width), nn.Linear(width, 5)
        self.blocks = nn.ModuleList(HandWrittenBlock(width) for _ in range(blocks))

    def forward(self, input_ids, labels=None, **kwargs):
        x, mask = self.embed(input_ids), None
        for block in self.blocks:
            x, mask = block(x, mask)
        logits = self.score(self.norm(x).mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return tf.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


_TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 3}

WHOLE = {
    "mamba": Tiny(
        tf.MambaConfig, tf.MambaForCausalLM,
        {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4, **_TEXT}, "causal",
    ),
    "rwkv": Tiny(
        tf.RwkvConfig, tf.RwkvForCausalLM,
        {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 3, "context_length": 16, **_TEXT},
        "causal",
    ),
    "deepseek_v3": Tiny(
        tf.DeepseekV3Config, tf.DeepseekV3ForCausalLM,
        {**_BASE, **_TEXT, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4,
         "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 8,
         "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
         "experts_implementation": "eager"}, "causal",
    ),
    "swin": Tiny(
        tf.SwinConfig, tf.SwinForImageClassification,
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4,
         "num_labels": 5, "drop_path_rate": 0.0}, "image",
    ),
    "hand_written": Tiny(SimpleNamespace, lambda config: HandWritten(), {}),
}  # fmt: skip


@contextmanager
def reference_blocks(blocks: Sequence[nn.Module], operations: Sequence[int]) -> Iterator[None]:
    """Let a plain model's blocks run under one row of a schedule, in the most obvious way."""

    def forward(block, operation):
        def run(x, *args, **kwargs):
            out = type(block).forward(block, x, *args, **kwargs)
            hidden, *others = out if isinstance(out, tuple) else (out,)
            if operation == Operation.SHORTCUT:
                hidden = x
            elif operation == Operation.FORWARD_ONLY:
                hidden = x + (hidden - x).detach()
            return (hidden, *others) if isinstance(out, tuple) else hidden

        return run

    for block, operation in zip(blocks, operations, strict=True):
        block.forward = forward(block, operation)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
