"""A tiny Llama with quantized weights, by kind; a kind whose package is absent skips the test."""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Callable

import pytest
import torch
import transformers as tf
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from tests.models import TINY


def _float() -> nn.Module:
    return TINY["llama"].build(hidden_size=64, intermediate_size=128, attention_bias=True)


@functools.cache
def _saved() -> str:
    folder = tempfile.mkdtemp()
    _float().save_pretrained(folder)
    return folder


def _loaded(config) -> nn.Module:
    return tf.AutoModelForCausalLM.from_pretrained(_saved(), quantization_config=config, dtype=torch.float32)


def _nf4() -> nn.Module:
    return _loaded(tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ))  # fmt: skip


def _int8() -> nn.Module:
    return _loaded(tf.BitsAndBytesConfig(load_in_8bit=True))


def _torchao() -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig

    return _loaded(tf.TorchAoConfig(Int8WeightOnlyConfig(version=2)))


def _hqq() -> nn.Module:
    """transformers 5.23 cannot load such a model, so its layers are exchanged by hand."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = _float()
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    config = BaseQuantizeConfig(nbits=4, group_size=32)
                    layer = HQQLinear(child.requires_grad_(False), config, compute_dtype=torch.float32, device="cpu")
                    setattr(parent, name, layer)
    return model.eval()


KINDS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "torchao": ("torchao", _torchao),
    "nf4": ("bitsandbytes", _nf4),
    "hqq": ("hqq", _hqq),
    "int8": ("bitsandbytes", _int8),
}


@functools.cache
def _built(kind: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages themselves
        return KINDS[kind][1]()


def quantized(kind: str) -> nn.Module:
    """A fresh model with weights quantized so."""
    package, _ = KINDS[kind]
    pytest.importorskip(package, reason=f"{package} is not installed: weights of kind {kind!r} are not tried")
    return copy.deepcopy(_built(kind))


def dense_twin(model: nn.Module) -> nn.Module:
    """The model with float32 weights in the place of quantized ones, as PEFT reads them."""
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if hasattr(child, "in_features"):
                    dense = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                    dense.weight.data.copy_(dequantize_module_weight(child))
                    if child.bias is not None:
                        dense.bias.data.copy_(child.bias)
                    setattr(parent, name, dense)
    return model


def batch(n: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    return TINY["llama"].batch(n, seed)
