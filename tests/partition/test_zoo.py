"""Families that D2FT finds from their structure: the fast execution equals the reference, in float64."""

import inspect

import pytest
import torch

from d2ft_peft import partition_model
from d2ft_peft.engine import compile_plan, get_runtime
from tests.reference import reference_forward
from tests.tuners.test_equality import assert_same_gradients, d2ft_model, plain_twin, random_rows
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
