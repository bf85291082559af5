"""Projections that no adapter targets are cut all the same: equal to the reference twin, in float64."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from d2ft_peft import partition_model
from d2ft_peft.engine import compile_plan, get_runtime
from tests.models import TINY
from tests.reference import reference_forward
from tests.tuners.cases import SOME_TARGETS, fresh
from tests.tuners.test_equality import LORA, assert_same_gradients, d2ft_model, random_rows, step


def twin_of(model, mode, targets):
    """The plain model, or plain LoRA, of which only `targets` train."""
    twin = copy.deepcopy(model)
    if mode == "lora":
        torch.manual_seed(7)
        fan_in_fan_out = all(p.transposed for p in partition_model(twin).projections.values())
        return get_peft_model(twin, LoraConfig(**LORA, target_modules=targets, fan_in_fan_out=fan_in_fan_out))
    for name, parameter in twin.named_parameters():
        module = f".{name.rpartition('.')[0]}"
        parameter.requires_grad_(any(module.endswith(f".{target}") for target in targets))
    return twin


@pytest.mark.quick(4)
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", TINY)
def test_untargeted_projections_are_cut_too(name, mode):
    model = fresh(name).double().train()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in TINY[name].batch().items()}
    twin = twin_of(model, mode, SOME_TARGETS[name]).train()
    base = twin.base_model.model if mode == "lora" else twin
    model = d2ft_model(model, mode, target_modules=SOME_TARGETS[name]).train()
    partition = partition_model(base)
    for row in random_rows(partition, seed=len(name), n=2):
        with reference_forward(base, partition, row):
            expected = step(twin, batch)
        with get_runtime(model).use(compile_plan(partition, row)):
            outputs = step(model, batch)
        torch.testing.assert_close(outputs.logits, expected.logits)
        assert_same_gradients(model, twin, mode)
