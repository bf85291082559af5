"""A transformer of one's own, of a type that nobody wrote down: its FFN is found, or it is said that it is not."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from d2ft_peft import partition_model
from d2ft_peft.engine import compile_plan, get_runtime
from tests.reference import reference_forward
from tests.tuners.test_equality import assert_same_gradients, d2ft_model, plain_twin, random_rows, step


class OwnConfig(PreTrainedConfig):
    model_type = "own"

    def __init__(self, ffn="packed", hidden_size=32, inner=48, **kwargs):
        super().__init__(**kwargs)
        self.ffn, self.hidden_size, self.inner, self.num_attention_heads = ffn, hidden_size, inner, 4


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        return self.to_out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """``packed``: the gates, then what they gate; ``feature by feature``: in turns; ``summed``: what no head can own,
    because the gate is normed over all features."""

    def __init__(self, config):
        super().__init__()
        self.kind = config.ffn
        self.both, self.back = (
            nn.Linear(config.hidden_size, 2 * config.inner),
            nn.Linear(config.inner, config.hidden_size),
        )

    def forward(self, x):
        both = self.both(x)
        gate, up = (both[..., ::2], both[..., 1::2]) if self.kind == "feature by feature" else both.chunk(2, -1)
        return self.back((gate.softmax(-1) if self.kind == "summed" else nn.functional.silu(gate)) * up)


class Kernels(nn.Module):
    """No linear layers at all."""

    def __init__(self, config):
        super().__init__()
        self.inner, self.outer = (nn.Conv1d(config.hidden_size, config.hidden_size, 1) for _ in range(2))

    def forward(self, x):
        return self.outer(self.inner(x.mT).relu()).mT


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.first, self.second = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.mix = Attention(config.hidden_size)
        self.think = Kernels(config) if config.ffn == "convolutions" else Gated(config)

    def forward(self, x):
        x = x + self.mix(self.first(x))
        return x + self.think(self.second(x))


class Own(PreTrainedModel):
    config_class = OwnConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.score = nn.Embedding(64, config.hidden_size), nn.Linear(config.hidden_size, 5)
        self.blocks = nn.ModuleList(Block(config) for _ in range(2))
        self.post_init()

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.score(x.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def build(ffn, **kwargs):
    torch.manual_seed(0)
    return Own(OwnConfig(ffn, **kwargs)).double()


BATCH = {"input_ids": torch.arange(21).reshape(3, 7), "labels": torch.tensor([0, 3, 2])}


@pytest.mark.quick(1)
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize(("ffn", "parts"), [("packed", 2), ("feature by feature", 1)])
def test_a_gate_packed_with_what_it_gates_is_cut(ffn, parts, mode):
    model = build(ffn)
    partition = partition_model(model)
    of_ffn = [branch for branch in partition.branches if branch.name == "ffn"]
    assert [(b.columns[0].name, b.columns[0].layout.parts) for b in of_ffn] == [
        ("blocks.0.think.both", parts), ("blocks.1.think.both", parts)
    ]  # fmt: skip
    twin, ours = plain_twin(model, mode, False).train(), d2ft_model(model, mode).train()
    base = twin.base_model.model if mode == "lora" else twin
    for row in random_rows(partition, seed=0, n=2):
        with reference_forward(base, partition, row):
            expected = step(twin, BATCH)
        with get_runtime(ours).use(compile_plan(partition, row)):
            outputs = step(ours, BATCH)
        torch.testing.assert_close(outputs.logits, expected.logits)
        assert_same_gradients(ours, twin, mode)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("ffn", "sizes", "whole"),
    [
        ("summed", {}, "think.both, think.back run whole"),
        ("packed", {"inner": 46}, "think.both, think.back run whole"),  # no multiple of the 4 heads
        ("convolutions", {}, "think.inner, think.outer run whole"),
    ],
)
def test_an_ffn_that_is_not_found_is_said_to_run_whole(ffn, sizes, whole):
    model = build(ffn, **sizes)
    with pytest.warns(UserWarning, match=rf"blocks.0 of model_type='own': {whole}.* Only attention is cut"):
        partition = partition_model(model)
    assert {branch.name for branch in partition.branches} == {"attention"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin, ours = plain_twin(model, "full", False).train(), d2ft_model(copy.deepcopy(model), "full").train()
    for row in random_rows(partition, seed=0, n=1):
        with reference_forward(twin, partition, row):
            expected = step(twin, BATCH)
        with get_runtime(ours).use(compile_plan(partition, row)):
            outputs = step(ours, BATCH)
        torch.testing.assert_close(outputs.logits, expected.logits)
        assert_same_gradients(ours, twin, "full")
