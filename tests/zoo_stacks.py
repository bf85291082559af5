"""Tiny models with several stacks: encoder-decoders, and language models behind towers. Built from configs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers as tf

from tests.models import Tiny


@dataclass(frozen=True)
class Stacks(Tiny):
    """A recipe.

    Attributes:
        stacks: Which stacks are scheduled; None is the default.
        quick: Whether the default suite tests it; the others are marked slow.
    """

    stacks: str | None = None
    quick: bool = False

    def batch(self, n: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
        """One batch, ragged: inputs of 7 tokens and targets of 5, the last of them padded."""
        generator = torch.Generator().manual_seed(seed)
        return _BATCHES[self.kind](n, generator)


def _ids(n: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(3, 60, (n, tokens), generator=generator)


def _targets(n: int, generator: torch.Generator) -> torch.Tensor:
    labels = _ids(n, 5, generator)
    labels[-1, 3:] = -100
    return labels


def _mask(n: int) -> torch.Tensor:
    mask = torch.ones(n, 7, dtype=torch.long)
    mask[-1, 5:] = 0
    return mask


def _seq2seq(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_ids": _ids(n, 7, generator), "attention_mask": _mask(n), "labels": _targets(n, generator)}


def _speech(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(n, 8, 12, generator=generator), "labels": _targets(n, generator)}


def _frames(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(n, 12, 8, generator=generator), "labels": _targets(n, generator)}


_BATCHES = {"seq2seq": _seq2seq, "speech": _speech, "frames": _frames}
_TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 64, "max_position_embeddings": 16,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, **_TEXT,
}  # fmt: skip
_T5 = {
    "d_model": 32, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "d_kv": 8, "d_ff": 48, "dropout_rate": 0.0,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, **_TEXT,
}  # fmt: skip
_SOUND = {"num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 16}


def _bart_like(name: str, **kwargs) -> Stacks:
    config, model = getattr(tf, f"{name}Config"), getattr(tf, f"{name}ForConditionalGeneration", None)
    quick = kwargs.pop("quick", False)
    return Stacks(config, model or getattr(tf, f"{name}MTModel"), {**_BART, **kwargs}, "seq2seq", quick=quick)


ENCODER_DECODERS = {
    "bart": _bart_like("Bart", quick=True),
    "blenderbot": _bart_like("Blenderbot"),
    "blenderbot-small": _bart_like("BlenderbotSmall"),
    "m2m_100": _bart_like("M2M100", encoder_layerdrop=0.0, decoder_layerdrop=0.0),
    "marian": _bart_like("Marian", decoder_vocab_size=64),
    "mbart": _bart_like("MBart"),
    "pegasus": _bart_like("Pegasus"),
    "plbart": _bart_like("PLBart"),
    "speech_to_text": Stacks(
        tf.Speech2TextConfig, tf.Speech2TextForConditionalGeneration,
        {**_BART, **_SOUND, "input_feat_per_channel": 8, "input_channels": 1, "conv_channels": 16,
         "max_source_positions": 32},
        "frames",
    ),
    "whisper": Stacks(
        tf.WhisperConfig, tf.WhisperForConditionalGeneration, {**_BART, **_SOUND}, "speech", quick=True
    ),
}  # fmt: skip
T5S = {
    "t5": Stacks(tf.T5Config, tf.T5ForConditionalGeneration, _T5, "seq2seq", quick=True),
    "flan-t5": Stacks(
        tf.T5Config, tf.T5ForConditionalGeneration, {**_T5, "feed_forward_proj": "gated-gelu"}, "seq2seq"
    ),
    "mt5": Stacks(tf.MT5Config, tf.MT5ForConditionalGeneration, _T5, "seq2seq"),
    "umt5": Stacks(tf.UMT5Config, tf.UMT5ForConditionalGeneration, _T5, "seq2seq", quick=True),
}
ZOO = {**ENCODER_DECODERS, **T5S}
