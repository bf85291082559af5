"""Attacks on DLoRA's traffic: each finds what it must where that is known, and listens to what really crosses."""

import dlora_privacy
import pytest
import torch
from dlora_attacks import (
    Inverter,
    fit,
    labels_by_candidates,
    labels_by_direction,
    linear_map,
    listening,
    nearest,
    noised,
    packed,
    recovered,
    two_groups,
    unigram,
)
from matplotlib.image import imread
from torch import nn

from d2ft_peft.dlora import connect
from tests.dlora.cases import adapter, ragged, serve, tiny_base


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("llama"))


def overheard(base, **options):
    """What a cloud heard of one step; and the edge's model."""
    with listening() as heard, serve(base) as (_, address):
        model = connect(address, base, adapter(target_modules=["up_proj"]), dtype=torch.float64, **options)
        model(**ragged()).loss.backward()
        return heard, model


def test_listening_hears_hidden_states_and_gradients_but_no_labels(base):
    heard, model = overheard(base)
    (hidden,) = heard.tensors("forward", "hidden")
    embedding = model.get_input_embeddings().weight
    torch.testing.assert_close(hidden, embedding[ragged()["input_ids"]].detach())
    (gradient,) = heard.tensors("backward", "out")
    assert gradient.shape == hidden.shape
    assert not heard.tensors("forward", "labels")
    everything = torch.ones(hidden.shape[:2], dtype=torch.bool)
    assert nearest(hidden, ragged()["input_ids"], everything, lambda position: embedding) == 100


def test_listening_hears_labels_where_the_head_is_in_the_cloud(base):
    heard, _ = overheard(base, head="cloud")
    (labels,) = heard.tensors("forward", "labels")
    assert torch.equal(labels, ragged()["labels"])


def test_a_question_and_its_answer_give_the_adapter_away(base):
    heard, model = overheard(base)
    asked = next(message for message in heard.told if message.kind == "exchange")
    answered = next(message for message in heard.got if message.kind == "answer")
    x, y = (next(iter(message.tensors.values())).flatten(0, 1) for message in (asked, answered))
    name = model.remote_span.adapters.groups[asked.fields["group"]][0]
    layer = model.get_base_model().get_submodule(name)
    adds = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(x @ linear_map(x, y).T, x @ adds.T)


def test_gradients_tell_the_labels_of_a_public_head():
    norm, head = nn.RMSNorm(16), torch.randn(50, 16)
    nn.init.uniform_(norm.weight, 0.5, 2)
    outs, labels = torch.randn(70, 16, requires_grad=True), torch.randint(0, 50, (70,))
    nn.functional.cross_entropy(norm(outs) @ head.T, labels).backward()
    found = labels_by_candidates(outs.grad, outs.detach(), norm, head)
    assert torch.equal(found, labels)
    assert (labels_by_direction(outs.grad, head) == labels).float().mean() > 0.5


def test_gradients_of_two_classes_point_in_two_directions():
    labels = torch.rand(40) < 0.3
    gradients = torch.where(labels[:, None], 1.0, -1.0) * torch.rand(40, 1) * torch.randn(8)
    found = two_groups(gradients + 0.01 * torch.randn(40, 8))
    assert torch.equal(found, labels) or torch.equal(~found, labels)


@pytest.mark.quick(1)
@pytest.mark.parametrize("context", [False, True])
def test_an_inverter_reads_what_it_has_learned_to_read(context):
    embedding, turned = torch.randn(20, 12), torch.randn(12, 12)
    tokens, mask = torch.randint(0, 20, (30, 6)), torch.rand(30, 6) < 0.8
    inverter = Inverter(12, embedding, context, 16)
    fit(inverter, embedding[tokens] @ turned, tokens, mask, 150, 10, lambda states: states, negatives=8)
    other = torch.randint(0, 20, (10, 6))
    everything = torch.ones_like(other, dtype=torch.bool)
    assert recovered(inverter, embedding[other] @ turned, other, everything) > 95
    assert recovered(inverter, torch.randn(10, 6, 12), other, everything) < 30


def test_what_disturbs_states():
    states = torch.randn(500, 64) * torch.tensor([1.0, 5.0]).repeat(250)[:, None]
    error = (noised(states, 0.3) - states).square().mean(-1).sqrt() / states.square().mean(-1).sqrt()
    assert error.mean() == pytest.approx(0.3, rel=0.02)
    assert 0 < (packed(states, "int8") - states).abs().max() < states.abs().max() / 200
    assert torch.equal(packed(states, "none"), states)
    tokens, mask = torch.tensor([[1, 1, 2, 2, 2]]), torch.tensor([[True, True, True, False, False]])
    assert unigram(tokens, mask, torch.tensor([[1, 3]]), torch.ones(1, 2, dtype=torch.bool)) == 50


def test_tables_and_picture(tmp_path):
    rows = [{"model": "llama", "what": "tokens", "attack": "most frequent token", "found": 5.0}]
    of_all = {"model": "llama", "what": "tokens", "packing": "none", "attack": "context", "found": 9.0}
    rows += [{**of_all, "depth": depth, "noise": noise} for depth in range(3) for noise in (0.0, 1.0)]
    assert "most frequent token" in dlora_privacy.tables(rows)
    dlora_privacy.plot(rows, str(tmp_path / "tokens.png"))
    assert imread(tmp_path / "tokens.png").std() > 0.01, "an empty picture"
