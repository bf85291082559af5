"""A tiny Llama with quantized weights, by kind; a kind whose package is absent skips the test."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
import transformers as tf
from torch import nn

from tests.models import TINY


SIZES = {"hidden_size": 64, "intermediate_size": 128}


def _bits(**kwargs) -> tf.BitsAndBytesConfig:
    return tf.BitsAndBytesConfig(**kwargs)


def _torchao() -> tf.TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return tf.TorchAoConfig(Int8WeightOnlyConfig(version=2))


KINDS = {
    "nf4": ("bitsandbytes", lambda: _bits(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )),
    "int8": ("bitsandbytes", lambda: _bits(load_in_8bit=True)),
    "torchao": ("torchao", _torchao),
    "hqq": ("hqq", lambda: tf.HqqConfig(nbits=4, group_size=32)),
}  # fmt: skip


@functools.cache
def _saved() -> str:
    import tempfile

    folder = tempfile.mkdtemp()
    TINY["llama"].build(**SIZES).save_pretrained(folder)
    return folder


@functools.cache
def _loaded(kind: str) -> nn.Module:
    _, config = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages themselves
        return tf.AutoModelForCausalLM.from_pretrained(_saved(), quantization_config=config(), dtype=torch.float32)


def quantized(kind: str) -> nn.Module:
    """A fresh model with weights quantized so."""
    package, _ = KINDS[kind]
    pytest.importorskip(package, reason=f"{package} is not installed: weights of kind {kind!r} are not tried")
    return copy.deepcopy(_loaded(kind))


def batch(n: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    return TINY["llama"].batch(n, seed)
