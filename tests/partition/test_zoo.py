"""Families that D2FT finds from their structure: the fast execution equals the reference, in float64."""

import copy
import inspect

import peft
import pytest
import torch

from d2ft_peft import D2FTConfig, Operation, partition_model
from d2ft_peft.costs import cost_model, flop_counter, probe_model
from d2ft_peft.engine import compile_plan, get_runtime
from tests.reference import reference_forward
from tests.tuners.cases import assert_plain, mixed_row
from tests.tuners.test_equality import (
    LORA,
    assert_same_gradients,
    d2ft_model,
    plain_name,
    plain_twin,
    random_rows,
)
from tests.zoo import ZOO


CUT = {name: tiny for name, tiny in ZOO.items() if not tiny.refused}
each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if tiny.quick else pytest.mark.slow) for name, tiny in CUT.items()]
)


def build(name):
    return ZOO[name].build().double()


def batch_of(name, model):
    batch = ZOO[name].batch()
    if "labels" not in inspect.signature(model.forward).parameters:
        batch.pop("labels", None)
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def step(model, batch):
    """The output that the loss is made of, after a backward pass through it."""
    model.zero_grad()
    torch.manual_seed(3)  # some models move positions, or mask patches, at random
    outputs = model(**batch)
    seen = outputs.logits if "labels" in batch else outputs.last_hidden_state
    loss = outputs.loss if "labels" in batch else (seen * torch.linspace(-1, 1, seen.shape[-1]).to(seen)).sum()
    if loss.requires_grad:
        loss.backward()
    return seen.detach()


@pytest.mark.quick(8)
@each
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_random_schedules_equal_the_reference(name, mode):
    model = build(name)
    batch = batch_of(name, model)
    twin, ours = plain_twin(model, mode, False).train(), d2ft_model(model, mode).train()
    base = twin.base_model.model if mode == "lora" else twin
    partition = partition_model(base)
    for row in random_rows(partition, seed=len(name), n=2):
        with reference_forward(base, partition, row):
            expected = step(twin, batch)
        with get_runtime(ours).use(compile_plan(partition, row)):
            outputs = step(ours, batch)
        torch.testing.assert_close(outputs, expected, rtol=1e-6, atol=1e-6)
        assert_same_gradients(ours, twin, mode, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, tiny in ZOO.items() if tiny.refused])
def test_a_family_that_cannot_be_cut_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=ZOO[name].refused):
        partition_model(build(name))


NOT_FOR_LORA = {
    **dict.fromkeys(("resnet", "squeezebert"), "there are no linear layers in .* that LoRA could train"),
    "ibert": "QuantLinear.* is not supported",  # PEFT's words
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", [name for name, tiny in ZOO.items() if tiny.refused])
@pytest.mark.filterwarnings("ignore:LoRA leaves")
def test_a_family_that_cannot_be_cut_trains_in_whole_blocks(name, mode):
    """Where every block runs, as under policies over samples, outputs and gradients are those of the model itself."""
    model = build(name)
    batch = batch_of(name, model)
    config = D2FTConfig(**LORA, subnets="blocks") if mode == "lora" else D2FTConfig(subnets="blocks")
    if mode == "lora" and name in NOT_FOR_LORA:
        with pytest.raises(ValueError, match=NOT_FOR_LORA[name]):
            peft.get_peft_model(model, config)
        return
    torch.manual_seed(7)
    ours = peft.get_peft_model(copy.deepcopy(model), config).train()
    twin, partition = copy.deepcopy(model).requires_grad_(False), get_runtime(ours).partitions["default"]
    if mode == "lora":
        torch.manual_seed(7)
        targets = ours.peft_config["default"].target_modules
        transposed = ours.peft_config["default"].fan_in_fan_out
        twin = peft.get_peft_model(twin, peft.LoraConfig(**LORA, target_modules=targets, fan_in_fan_out=transposed))
    trained = {plain_name(key) for key, p in ours.named_parameters() if p.requires_grad}
    for key, parameter in twin.named_parameters():
        parameter.requires_grad_(plain_name(key) in trained)
    expected = step(twin.train(), batch)
    with get_runtime(ours).use(compile_plan(partition, [Operation.FULL] * partition.num_scheduled)):
        outputs = step(ours, batch)
    assert trained
    torch.testing.assert_close(outputs, expected)
    assert_same_gradients(ours, twin, mode)


CHECKPOINTED = [
    name if name in ("whisper", "beit") else pytest.param(name, marks=pytest.mark.slow)
    for name, tiny in CUT.items()
    if tiny.model.supports_gradient_checkpointing
]


@pytest.mark.parametrize("name", CHECKPOINTED)
@pytest.mark.parametrize("use_reentrant", [pytest.param(True, marks=pytest.mark.slow), False])
def test_checkpointing_changes_nothing(name, use_reentrant):
    """Of an activation between two regions, a bias of every head, and a projection of other inputs."""
    model = build(name)
    batch = batch_of(name, model)
    plain, ours = d2ft_model(model, "full").train(), d2ft_model(model, "full").train()
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    partition = partition_model(model)
    for row in random_rows(partition, seed=1, n=1):
        with get_runtime(plain).use(compile_plan(partition, row)):
            expected = step(plain, batch)
        with get_runtime(ours).use(compile_plan(partition, row)):
            outputs = step(ours, batch)
        torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
        assert_same_gradients(ours, plain, "full", rtol=1e-12, atol=1e-12)


SAVED = [name if name in ("whisper", "deberta-v2") else pytest.param(name, marks=pytest.mark.slow) for name in CUT]


def values(model, batch):
    torch.manual_seed(3)
    with torch.no_grad():
        outputs = model.eval()(**batch)
    return outputs.logits if "labels" in batch else outputs.last_hidden_state


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_what_was_trained_is_saved_loaded_and_merged(name, mode, tmp_path):
    """LoRA loads in stock PEFT, into modules that D2FT has never seen."""
    model = build(name)
    batch = batch_of(name, model)
    ours = d2ft_model(model, mode).train()
    runtime = get_runtime(ours)
    partition = runtime.partitions["default"]
    with runtime.use(compile_plan(partition, mixed_row(partition))):
        step(ours, batch)
    for parameter in ours.parameters():
        if parameter.grad is not None:
            parameter.data -= 0.5 * parameter.grad.sign()
    trained = values(ours, batch)
    assert not torch.allclose(trained, values(model, batch), atol=1e-3)
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    torch.testing.assert_close(values(loaded, batch), trained, rtol=1e-6, atol=1e-6)
    if mode == "lora":
        assert not any(type(module).__module__.startswith("d2ft_peft") for module in loaded.modules())
    merged = ours.merge_and_unload()
    torch.testing.assert_close(values(merged, batch), trained, rtol=1e-6, atol=1e-6)
    assert_plain(merged)


@pytest.mark.parametrize("name", ["llama4_vision_model", "whisper", "mobilebert", "modernbert"])
def test_the_cost_of_a_pass_is_that_of_its_products(name):
    """Whatever its blocks call what enters them, and whatever else they compute."""
    model = build(name).eval()
    batch = batch_of(name, model)
    partition = partition_model(model)
    one = {key: value[:1] for key, value in batch.items() if key != "labels"}
    with torch.no_grad(), flop_counter() as counted:
        model(**one)
    costs = cost_model(model, partition, probe_model(model, partition, batch))
    assert costs.forward_flops(1) == pytest.approx(counted.get_total_flops(), rel=0.02)
