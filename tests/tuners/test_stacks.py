"""Models with several stacks: the fast execution against its slow twin, outputs and every gradient in float64."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from d2ft_peft import D2FTConfig, partition_model
from d2ft_peft.engine import compile_plan, get_runtime
from tests.reference import reference_forward
from tests.tuners.test_equality import (
    LORA,
    assert_same_gradients,
    d2ft_model,
    enable_checkpointing,
    random_rows,
    step,
)
from tests.zoo_stacks import REFUSED, TOWERS, ZOO


pytestmark = pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces")  # said of every encoder-decoder
NAMES = [pytest.param(name, marks=() if one.quick else pytest.mark.slow) for name, one in ZOO.items()]
each_model = pytest.mark.parametrize("name", NAMES)


# Modules around subnets with parameters of their own: a temperature of the loss, an image's newline, gates.
OWN_PARAMETERS = {
    **dict.fromkeys(TOWERS, "the model itself"),
    **dict.fromkeys(("llava_next", "llava_onevision"), "model"),
    "mllama": "model.language_model.layers.1",
}


def twins(name, mode, train_boundary=False, **overrides):
    """The plain model as anybody would fine-tune it, the D2FT model, and the subnets."""
    recipe = ZOO[name]
    model = recipe.build(**overrides).double()
    model.set_experts_implementation("eager")  # products of groups know no float64
    partition = partition_model(model, stacks=recipe.stacks)
    twin = copy.deepcopy(model)
    if mode == "lora":
        torch.manual_seed(7)
        twin = get_peft_model(twin, LoraConfig(**LORA, target_modules=list(partition.projections)))
    else:
        for path, parameter in twin.named_parameters():
            parameter.requires_grad_(train_boundary or path.rpartition(".")[0] in partition.projections)
    ours = d2ft_model(model, mode, train_boundary, stacks=recipe.stacks)
    return twin.train(), ours.train(), partition


def batch_of(name):
    floats = {k: v.double() for k, v in ZOO[name].batch().items() if torch.is_tensor(v) and v.is_floating_point()}
    return {**ZOO[name].batch(), **floats}


@pytest.mark.quick(5)
@pytest.mark.parametrize(
    "mode, checkpointing",
    [
        pytest.param("full", "off", marks=pytest.mark.slow),
        ("full with boundary", "non-reentrant"),
        ("lora", "non-reentrant"),
        pytest.param("full with boundary", "off", marks=pytest.mark.slow),
        pytest.param("lora", "off", marks=pytest.mark.slow),
    ],
)
@each_model
def test_random_schedules_equal_the_reference(name, mode, checkpointing):
    train_boundary, mode = "boundary" in mode, mode.split()[0]
    if train_boundary and name in OWN_PARAMETERS:
        with pytest.raises(ValueError, match=f"train_boundary=True cannot copy '{OWN_PARAMETERS[name]}': it has para"):
            twins(name, mode, train_boundary)
        return
    twin, model, partition = twins(name, mode, train_boundary)
    enable_checkpointing(model, checkpointing)
    base, batch = twin.base_model.model if mode == "lora" else twin, batch_of(name)
    for row in random_rows(partition, seed=len(name), n=2):
        with reference_forward(base, partition, row):
            expected = step(twin, batch)
        with get_runtime(model).use(compile_plan(partition, row)):
            outputs = step(model, batch)
        torch.testing.assert_close(outputs.loss, expected.loss)
        assert_same_gradients(model, twin, mode)


@pytest.mark.quick(4)
@pytest.mark.parametrize("mode", [pytest.param("full", marks=pytest.mark.slow), "lora"])
@each_model
def test_a_saved_adapter_loads_and_merges(name, mode, tmp_path):
    recipe = ZOO[name]
    config = D2FTConfig(**LORA, stacks=recipe.stacks) if mode == "lora" else D2FTConfig(stacks=recipe.stacks)
    base = recipe.build().eval()
    model = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model(**recipe.batch()).loss
        assert (expected - base(**recipe.batch()).loss).abs() > 1e-5
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        torch.testing.assert_close(loaded(**recipe.batch()).loss, expected)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**recipe.batch()).loss, expected, rtol=1e-4, atol=1e-4)
    assert type(merged) is type(base)


@pytest.mark.quick(1)
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_model_of_which_only_a_tower_could_be_cut_is_not_cut_by_default(name, mode):
    """Nor is that said of it which a budget for one tower would mean; whole blocks run as they are."""
    recipe = REFUSED[name]
    model = recipe.build().double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in recipe.batch().items()}
    with pytest.raises(ValueError, match="can(not)? be (cut|partitioned) into heads"):
        partition_model(model)
    with pytest.warns(UserWarning, match="because heads are not cut: "):
        ours = get_peft_model(copy.deepcopy(model), D2FTConfig(**(LORA if mode == "lora" else {}))).train()
    partition = get_runtime(ours).partitions["default"]
    with get_runtime(ours).use(compile_plan(partition, [2] * partition.num_scheduled)):
        outputs = step(ours, batch)
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)
    if mode == "full":
        torch.testing.assert_close(outputs.loss, model.train()(**batch).loss)
