"""Kill-and-Revive across a link: what killed modules do, what crosses, and who decides."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from d2ft_peft.dlora import KillReviveCallback, connect

from .cases import adapter, check_close, collate, edge_like, ragged, samples, serve, step, tiny_base, whole


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    base = tiny_base(tmp_path_factory.mktemp("llama"))
    with serve(base) as (_, address):
        yield base, address


def train(model, folder, *callbacks, **options):
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=3, num_train_epochs=2, learning_rate=1e-2, logging_steps=1,
        report_to=[], disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trainer = Trainer(model, args, data_collator=collate, train_dataset=samples(), callbacks=list(callbacks))
    trainer.train()
    return trainer


def trained(model):
    return {name: value.detach() for name, value in model.state_dict().items() if "lora_" in name}


def freeze(model, *names):
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            parameter.requires_grad_(False)


@pytest.mark.quick(1)
@pytest.mark.parametrize("options", [{}, {"head": "cloud"}, {"edge_blocks": (1, 0)}, {"in_flight": 2}], ids=str)
@pytest.mark.parametrize("killed", ["cloud_copy", "exchange"])
def test_a_killed_module_goes_on_adding_what_it_learned(llama, killed, options):
    base, address = llama
    local = whole(base, adapter())
    edge = edge_like(local, address, base, adapter(), killed=killed, **options)
    for names in (["layers.1."], ["layers.2.self_attn", "layers.0."], ["mlp"]):
        for model in (local, edge):
            model.requires_grad_(False)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lora_" in name)
            freeze(model, *names)
        check_close(step(edge, ragged())[1], step(local, ragged())[1])
        with torch.no_grad():
            torch.testing.assert_close(edge(**ragged()).loss, local(**ragged()).loss)


def test_copies_are_not_asked_and_cross_once(llama):
    base, address = llama
    local = whole(base, adapter())
    trips, sent = {}, {}
    for killed in ("cloud_copy", "exchange"):
        edge = edge_like(local, address, base, adapter(), killed=killed)
        freeze(edge, "layers.0.", "layers.1.")
        step(edge, ragged())
        before = copy.copy(edge.remote_span.link.traffic)
        step(edge, ragged())
        traffic = edge.remote_span.link.traffic
        trips[killed], sent[killed] = traffic.round_trips - before.round_trips, traffic.sent - before.sent
    assert trips["cloud_copy"] < trips["exchange"] and sent["cloud_copy"] < sent["exchange"] / 2


def test_backward_ends_below_the_lowest_module_that_learns(llama):
    base, address = llama
    edge = connect(address, base, adapter(), dtype=torch.float64, killed="exchange")
    freeze(edge, "layers.0.", "layers.1.", "layers.2.self_attn")
    received = edge.remote_span.link.traffic.received
    step(edge, ragged())
    after_step = edge.remote_span.link.traffic.received
    with torch.no_grad():
        edge(**ragged())
    of_forward = edge.remote_span.link.traffic.received - after_step
    # Besides what a forward pass brings: gradients of gate and up, of down, and an end; nothing of what is below.
    width, wide = 32, 48
    expected = 3 * 7 * (2 * wide + width) * 8
    assert expected < after_step - received - of_forward < expected + 1000


def test_a_copy_follows_its_module(llama):
    base, address = llama
    local = whole(base, adapter())
    edge = edge_like(local, address, base, adapter())
    for model in (local, edge):
        freeze(model, "layers.1.")
        step(model, ragged())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layers.1." in name and "lora_B" in name:
                    parameter.mul_(2)
    check_close(step(edge, ragged())[1], step(local, ragged())[1])


@pytest.mark.quick(1)
@pytest.mark.parametrize("killed", ["cloud_copy", "exchange"])
@pytest.mark.parametrize("idle", ["probe", "last", "random"])
def test_a_trainers_run_is_the_local_one(llama, tmp_path, killed, idle):
    base, address = llama
    local = whole(base, adapter(init_lora_weights=True))
    edge = edge_like(local, address, base, adapter(init_lora_weights=True), killed=killed)
    rule = {"active": 5, "interval": 2, "idle": idle}
    first, second = KillReviveCallback(**rule), KillReviveCallback(**rule)
    train(local, tmp_path, first)
    train(edge, tmp_path, second)
    assert first.kill_revive.state == second.kill_revive.state and first.kill_revive.state.decisions > 2
    check_close(trained(edge), trained(local), 1e-9)


@pytest.mark.thorough
def test_dropped_modules_begin_again(llama, tmp_path):
    base, address = llama
    edge = connect(address, base, adapter(init_lora_weights=True), dtype=torch.float64, killed="drop")
    callback = KillReviveCallback(active=5, interval=2, choose="redrawn")
    train(edge, tmp_path, callback)
    active = set(callback.kill_revive.active)
    for name, layer in edge.remote_span.adapters.layers.items():
        assert (name in active) or not layer.lora_B["default"].weight.any()
    assert any(edge.remote_span.adapters.layers[name].lora_B["default"].weight.any() for name in active)
    edge.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), tmp_path / "adapter"
    )
    with torch.no_grad():
        torch.testing.assert_close(edge.eval()(**ragged()).logits, plain.eval()(**ragged()).logits)


@pytest.mark.thorough
def test_the_cloud_decides_as_the_edge_would(llama, tmp_path):
    base, address = llama
    states = []
    for in_cloud in (False, True):
        torch.manual_seed(0)
        edge = connect(address, base, adapter(init_lora_weights=True), dtype=torch.float64)
        decide = {"decide": edge.decide_in_cloud} if in_cloud else {}
        callback = KillReviveCallback(active=4, interval=1, idle="last", **decide)
        train(edge, tmp_path, callback)
        states.append((callback.kill_revive.state, trained(edge)))
    assert states[0][0] == states[1][0]
    check_close(states[1][1], states[0][1], 0)


@pytest.mark.thorough
def test_bytes_fall_with_the_modules_that_are_alive(llama, tmp_path):
    base, address = llama
    sent = []
    for active in (21, 2):
        edge = connect(address, base, LoraConfig(r=4, target_modules="all-linear"), dtype=torch.float64)
        callback = KillReviveCallback(active=active, interval=100, choose="fixed")
        if active == 21:
            with pytest.warns(UserWarning, match="nothing is ever killed"):
                train(edge, tmp_path, callback)
        else:
            train(edge, tmp_path, callback)
        sent.append(edge.remote_span.link.traffic.sent)
    assert sent[1] < sent[0] / 3


STATE = {"active": [0], "known": [None], "decisions": 0}


@pytest.mark.parametrize(
    "question",
    [
        {},
        {"rule": [], "state": {}, "observations": {}},
        {"rule": {"active": 0}, "state": STATE, "observations": {"change": [1]}},
        {"rule": {}, "state": {**STATE, "active": [3]}, "observations": {"change": [1]}},
        {"rule": {}, "state": STATE, "observations": {"change": [1, 2]}},
        {"rule": {"nonsense": 1}, "state": STATE, "observations": {"change": [1]}},
    ],
)
def test_questions_that_make_no_sense_are_refused(llama, question):
    base, address = llama
    edge = connect(address, base, adapter(), dtype=torch.float64)
    with pytest.raises(RuntimeError, match="no decision can be made"):
        edge.remote_span.link.call("Decide", question)
