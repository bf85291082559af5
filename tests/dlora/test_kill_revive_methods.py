"""Every PEFT method that puts modules into layers is killed and revived by the same code; the others say why not."""

import peft
import pytest
import torch
from torch import nn

from d2ft_peft.dlora import KillRevive
from tests.dlora.kill_revive_methods import LLAMA, REFUSED, WORKS, adam, adapt, batch, lora
from tests.models import TINY


pytestmark = pytest.mark.filterwarnings("ignore")  # of methods, about shapes


def values(kill_revive):
    return {module.name: [p.detach().clone() for p in module.parameters] for module in kill_revive._modules}


def moved(before, after):
    return {name for name in before if not all(map(torch.equal, before[name], after[name]))}


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", WORKS)
def test_only_active_modules_have_gradients_and_move(name):
    model = adapt(WORKS[name])
    optimizer = adam(model)
    kill_revive = KillRevive(model, optimizer, active=2, interval=2, choose="redrawn", seed=1)
    seen = set()
    for step in range(6):
        before, active = values(kill_revive), set(kill_revive.active)
        model(**batch(name, seed=step)).loss.backward()
        for module in kill_revive._modules:
            has_gradient = any(parameter.grad is not None for parameter in module.parameters)
            assert has_gradient == (module.name in active), module.name
        optimizer.step()
        kill_revive.step()
        optimizer.zero_grad()
        assert moved(before, values(kill_revive)) == active
        seen |= active
    assert len(seen) > 2  # several had momentum when they were killed


@pytest.mark.quick(10)
@pytest.mark.parametrize("name", WORKS)
def test_a_killed_module_still_computes(name):
    model = adapt(WORKS[name])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.eval()
    torch.manual_seed(0)
    before = model(**batch(name)).logits
    with KillRevive(model, adam(model), active=1):
        torch.manual_seed(0)
        assert torch.equal(model(**batch(name)).logits, before)


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", WORKS)
def test_gradients_of_active_modules_are_those_of_plain_training(name):
    plain, model = adapt(WORKS[name]), adapt(WORKS[name])
    with KillRevive(model, adam(model), active=3, interval=1) as kill_revive:  # with a probe in the first step
        for one in (plain, model):
            torch.manual_seed(0)
            one(**batch(name)).loss.backward()
        theirs = {n: p.grad for n, p in plain.named_parameters()}
        prefix = "base_model.model."
        for n, parameter in model.named_parameters():
            outside = not any(n.startswith(prefix + other) for other in kill_revive.names)
            if any(n.startswith(prefix + active) for active in kill_revive.active) or outside:
                assert parameter.grad is None if theirs[n] is None else torch.equal(parameter.grad, theirs[n]), n
            else:
                assert parameter.grad is None, n


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_killed_in_parts_is_refused_with_the_reason(name):
    config, message = REFUSED[name]
    model = adapt(config, tie_word_embeddings="tied" in name)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1)), *model.parameters()], 0.1)
    with pytest.raises(ValueError, match=message):
        KillRevive(model, optimizer, active=1)


def test_a_model_without_an_adapter_is_refused():
    model = TINY["llama"].build()
    with pytest.raises(ValueError, match="model has no adapter; make it with get_peft_model"):
        KillRevive(model, torch.optim.SGD(model.parameters(), 0.1), active=1)


def test_names_are_those_of_the_base_model():
    model = adapt(lora())
    kill_revive = KillRevive(model, adam(model), active=1)
    assert kill_revive.names[:3] == [
        "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj",
    ]  # fmt: skip
    projections = TINY["llama"].build().named_modules()
    assert kill_revive.names == [name for name, _ in projections if name.endswith(tuple(LLAMA))]


def test_what_is_outside_of_layers_always_trains_and_is_not_counted():
    config = lora(modules_to_save=["classifier"], target_modules=["q_proj", "v_proj"], bias="lora_only")
    model = adapt(config, "vit")
    kill_revive = KillRevive(model, adam(model), active=1)
    assert len(kill_revive.names) == 6
    (active,) = kill_revive.active
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = {name for name in trainable if f".{active}." in name}
    assert trainable - own == {
        f"base_model.model.classifier.modules_to_save.default.{name}" for name in ("weight", "bias")
    }
    assert any(name.endswith("base_layer.bias") for name in own)  # which belongs to the module


def test_adapters_that_transformers_itself_injected_work_too():
    model = TINY["llama"].build()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=LLAMA))
    kill_revive = KillRevive(model, adam(model), active=1)
    assert len(kill_revive.names) == 9 and kill_revive.names[0] == "model.layers.0.self_attn.q_proj"


def test_a_mixed_model_works_too():
    model = peft.get_peft_model(TINY["llama"].build(), lora()(), mixed=True)
    model.add_adapter("other", peft.LoHaConfig(r=4, target_modules=LLAMA))
    model.set_adapter(["default", "other"])
    kill_revive = KillRevive(model, adam(model), active=1)
    model(**batch()).loss.backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient and all(kill_revive.active[0] in name for name in with_gradient)
