"""Wherever blocks, adapters and head are, the model is the same: outputs and gradients are those of local PEFT LoRA."""

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from d2ft_peft.dlora import connect

from .cases import adapter, check_close, edge_like, ragged, serve, step, tiny_base, whole


PLACEMENTS = {
    "the paper's": {},
    "edge blocks below": {"edge_blocks": (1, 0)},
    "edge blocks on both sides": {"edge_blocks": (1, 1)},
    "head in the cloud": {"head": "cloud"},
    "edge blocks and head in the cloud": {"edge_blocks": (2, 0), "head": "cloud"},
    "parts in flight": {"in_flight": 2},
    "parts on connections of their own": {"in_flight": 3, "connections": 2},
    "more parts than rows, head in the cloud": {"in_flight": 5, "head": "cloud"},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    base = tiny_base(tmp_path_factory.mktemp("llama"))
    with serve(base) as (_, address):
        yield base, address


@pytest.mark.quick(3)
@pytest.mark.parametrize("options", PLACEMENTS.values(), ids=PLACEMENTS)
def test_every_placement_is_local_lora(llama, options):
    base, address = llama
    local = whole(base, adapter())
    edge = edge_like(local, address, base, adapter(), **options)
    for batch in (ragged(), ragged(n=1, seed=2)):
        loss, grads = step(local, batch)
        found, edge_grads = step(edge, batch)
        torch.testing.assert_close(found, loss)  # transformers computes it in float32
        check_close(edge_grads, grads)


@pytest.mark.parametrize(("name", "options"), [("gpt2", {"fan_in_fan_out": True}), ("qwen3", {})])
def test_other_decoders(tmp_path, name, options):
    base = tiny_base(tmp_path, name)
    local = whole(base, adapter(**options))
    with serve(base) as (_, address):
        edge = edge_like(local, address, base, adapter(**options), edge_blocks=(1, 0))
        check_close(step(edge, ragged(name))[1], step(local, ragged(name))[1])


@pytest.mark.parametrize(
    ("name", "auto"), [("bert", AutoModelForSequenceClassification), ("vit", AutoModelForImageClassification)]
)
def test_classifiers_whose_head_trains_on_the_edge(tmp_path, name, auto):
    base = tiny_base(tmp_path, name)
    config = adapter(target_modules=r".*(q_proj|query|v_proj|value)", modules_to_save=["classifier"])
    local = whole(base, config, auto)
    with serve(base) as (_, address):
        edge = edge_like(local, address, base, copy.deepcopy(config), model_class=auto)
        batch = ragged(name)
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        check_close(step(edge, batch)[1], step(local, batch)[1])


def test_bare_labels_count_as_the_trainer_counts_them(llama):
    base, address = llama
    local = whole(base, adapter())
    for head in ("edge", "cloud"):
        edge = edge_like(local, address, base, adapter(), head=head, in_flight=2)
        items = torch.tensor(40)
        loss, grads = step(local, ragged(), num_items_in_batch=items)
        found, edge_grads = step(edge, ragged(), num_items_in_batch=items)
        torch.testing.assert_close(found, loss)  # transformers computes it in float32
        check_close(edge_grads, grads)


@pytest.mark.parametrize("use_cache", [False, True])
def test_positions_that_restart_within_a_row(llama, use_cache):
    base, address = llama
    local = whole(base, adapter())
    edge = edge_like(local, address, base, adapter())
    batch = {**ragged(n=1), "use_cache": use_cache, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}
    del batch["attention_mask"]
    check_close(step(edge, batch)[1], step(local, batch)[1])
    without = {name: value for name, value in batch.items() if name != "position_ids"}
    assert not torch.equal(step(local, batch)[0], step(local, without)[0])


def test_gradient_checkpointing_of_the_edges_blocks(llama):
    base, address = llama
    local = whole(base, adapter())
    edge = edge_like(local, address, base, adapter(), edge_blocks=(1, 1))
    edge.base_model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = edge.remote_span.link.traffic.sent
    check_close(step(edge, ragged())[1], step(local, ragged())[1])
    once = edge.remote_span.link.traffic.sent - before
    plain = edge_like(local, address, base, adapter(), edge_blocks=(1, 1))
    before = plain.remote_span.link.traffic.sent
    step(plain, ragged())
    assert plain.remote_span.link.traffic.sent - before == once  # nothing crosses again


def test_an_input_that_needs_a_gradient_gets_it(llama):
    base, address = llama
    local = whole(base, adapter())
    edge = edge_like(local, address, base, adapter())
    found = []
    for model in (local, edge):
        embeds = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        model(inputs_embeds=embeds, labels=torch.zeros(2, 4, dtype=torch.long)).loss.backward()
        found.append(embeds.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


def test_a_model_without_its_adapter_is_the_base_model(llama):
    base, address = llama
    local = whole(base, adapter())
    edge = edge_like(local, address, base, adapter())
    batch = ragged()
    with torch.no_grad(), local.disable_adapter(), edge.disable_adapter():
        before = edge.remote_span.link.traffic.round_trips
        torch.testing.assert_close(edge(**batch).logits, local(**batch).logits, rtol=1e-10, atol=1e-10)
        assert edge.remote_span.link.traffic.round_trips == before + 1  # nothing was asked


def test_modules_that_were_never_alive_cost_nothing(llama):
    base, address = llama
    edge = connect(address, base, LoraConfig(r=4, target_modules="all-linear"), dtype=torch.float64)
    traffic = edge.remote_span.link.traffic
    with torch.no_grad():  # B is zero: nothing is added anywhere
        before = traffic.round_trips
        edge(**ragged())
    assert traffic.round_trips == before + 1
    for name, parameter in edge.named_parameters():
        parameter.requires_grad_("layers.2.self_attn.q_proj.lora" in name)
    before = traffic.round_trips
    step(edge, ragged())  # output, one exchange, and done: the gradient is told, not asked for
    assert traffic.round_trips == before + 4
    assert edge.remote_span.active_modules == 1


@pytest.mark.quick(1)
@pytest.mark.parametrize("options", [{}, {"edge_blocks": (1, 1)}, {"head": "cloud"}], ids=str)
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "use_cache": False},
    ],
    ids=str,
)
def test_generation(llama, options, how):
    base, address = llama
    local = whole(base, adapter()).eval()
    edge = edge_like(local, address, base, adapter(), **options).eval()
    ids = ragged()["input_ids"][:, :4]
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
    found = []
    for model in (local, edge):
        torch.manual_seed(3)
        found.append(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, **how))
    assert torch.equal(*found)


def test_a_cache_that_is_cropped_and_reordered(llama):
    base, address = llama
    local = whole(base, adapter()).eval()
    edge = edge_like(local, address, base, adapter(), edge_blocks=(1, 0)).eval()
    ids = ragged()["input_ids"]
    logits = []
    for model in (local, edge):
        with torch.no_grad():
            cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
            cache.crop(-1)
            cache.reorder_cache(torch.tensor([2, 0, 0]))
            logits.append(model(input_ids=ids[:, 3:6], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-10, atol=1e-10)


def test_a_cache_of_a_training_pass_is_not_read(llama):
    base, address = llama
    edge = connect(address, base, adapter(), dtype=torch.float64)
    ids = ragged()["input_ids"]
    cache = edge(input_ids=ids, use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(ValueError, match="begin with an empty cache"):
        edge(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
