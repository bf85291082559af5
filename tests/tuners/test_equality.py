"""The fast execution against its slow twin: equal outputs and equal gradients of every parameter, in float64."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from d2ft_peft import D2FTConfig, Operation, partition_model
from d2ft_peft.engine import compile_plan, get_runtime
from tests.models import TINY
from tests.reference import reference_forward


LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
CHECKPOINTING = {
    "off": None,
    "non-reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
}


def random_rows(partition, seed, n=4):
    """Rows of independent random operations, and the corner cases: nothing FULL, nothing active, blocks without."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 3, partition.num_scheduled) for _ in range(n)]
    whole_blocks = rng.integers(0, 3, len(partition.blocks))[partition.subnet_blocks]
    only = [np.full(partition.num_scheduled, operation) for operation in Operation]
    return [*rows, whole_blocks, *only]


def plain_twin(model, mode, train_boundary, targets=None):
    """The model as anybody would fine-tune it without D2FT; `targets` of LoRA are all by default."""
    twin = copy.deepcopy(model)
    if mode == "lora":
        partition = partition_model(twin)
        targets = targets or [name for branch in partition.branches for name in branch.targets]
        fan_in_fan_out = all(p.transposed for p in partition.projections.values())
        torch.manual_seed(7)
        return get_peft_model(twin, LoraConfig(**LORA, target_modules=targets, fan_in_fan_out=fan_in_fan_out))
    targets = {name for branch in partition_model(twin).branches for name in branch.targets}
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(train_boundary or name.rpartition(".")[0] in targets)
    return twin


def d2ft_model(model, mode, train_boundary=False, **kwargs):
    config = D2FTConfig(**LORA, **kwargs) if mode == "lora" else D2FTConfig(train_boundary=train_boundary, **kwargs)
    torch.manual_seed(7)
    return get_peft_model(copy.deepcopy(model), config)


def plain_name(name):
    return name.removeprefix("base_model.model.").replace("d2ft_layers.default.", "").replace("base_layer.", "")


def gradients(model, mode):
    named = {name if mode == "lora" else plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}


def step(model, batch, accumulate=False):
    """One forward and backward pass; a loss that no parameter reaches has no backward."""
    if not accumulate:
        model.zero_grad()
    outputs = model(**batch)
    if outputs.loss.requires_grad:
        outputs.loss.backward()
    return outputs


def enable_checkpointing(model, kind):
    if CHECKPOINTING[kind] is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING[kind])
        model.enable_input_require_grads()


def assert_same_gradients(model, twin, mode, **tolerance):
    ours, theirs = gradients(model, mode), gradients(twin, mode)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.quick(5)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("mode", ["full", "full with boundary", "lora"])
@pytest.mark.parametrize("name", TINY)
def test_random_schedules_equal_the_reference(name, mode, checkpointing):
    train_boundary, mode = "boundary" in mode, mode.split()[0]
    model = TINY[name].build().double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in TINY[name].batch().items()}
    twin = plain_twin(model, mode, train_boundary).train()
    model = d2ft_model(model, mode, train_boundary).train()
    enable_checkpointing(model, checkpointing)
    base = twin.base_model.model if mode == "lora" else twin
    partition = partition_model(base)
    for index, row in enumerate(random_rows(partition, seed=len(name))):
        accumulate = index % 2 == 1  # the first micro-batch of a step and later ones go different ways
        with reference_forward(base, partition, row):
            expected = step(twin, batch, accumulate)
        with get_runtime(model).use(compile_plan(partition, row)):
            outputs = step(model, batch, accumulate)
        torch.testing.assert_close(outputs.logits, expected.logits)
        assert_same_gradients(model, twin, mode)
