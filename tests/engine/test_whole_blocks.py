"""Whole blocks as subnets against plain torch code: equal outputs, equal gradients of every parameter, in float64."""

import copy
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from d2ft_peft import D2FTConfig, Operation
from d2ft_peft.engine import compile_plan, get_runtime
from d2ft_peft.engine.checkpointing import PlannedCheckpoint
from tests.whole_models import WHOLE, reference_blocks


LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
FULL, FORWARD_ONLY, SHORTCUT = (int(o) for o in (Operation.FULL, Operation.FORWARD_ONLY, Operation.SHORTCUT))


def rows(blocks):
    """Random rows, and those of one operation."""
    rng = np.random.default_rng(0)
    return [*rng.integers(0, 3, (2, blocks)), *([operation] * blocks for operation in Operation)]


def double(name):
    batch = {k: v.double() if v.is_floating_point() else v for k, v in WHOLE[name].batch().items()}
    return WHOLE[name].build().double(), batch


def whole(model, lora, **kwargs):
    """The adapted model; what LoRA leaves alone is said elsewhere."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LoRA leaves")
        config = D2FTConfig(**(LORA if lora else {}), subnets="blocks", **kwargs)
        return get_peft_model(copy.deepcopy(model), config).train()


def twin_of(model, adapted, lora):
    """The model as anybody would train it without D2FT, and its blocks."""
    names = get_runtime(adapted).partitions["default"].blocks
    twin = copy.deepcopy(model)
    if lora:
        torch.manual_seed(7)
        targets = adapted.peft_config["default"].target_modules
        twin = get_peft_model(twin, LoraConfig(**LORA, target_modules=targets))
        return twin.train(), [twin.base_model.model.get_submodule(name) for name in names]
    twin.requires_grad_(False)
    blocks = [twin.get_submodule(name).requires_grad_(True) for name in names]
    return twin.train(), blocks


def gradients(model):
    """By the names of the plain model."""

    def plain(name):
        return name.removeprefix("base_model.model.").replace("d2ft_layers.default.", "").replace("base_layer.", "")

    return {plain(n): torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
            if p.requires_grad}  # fmt: skip


def step(model, batch):
    model.zero_grad()
    outputs = model(**batch)
    if outputs.loss.requires_grad:
        outputs.loss.backward()
    return outputs


def assert_equal(model, twin, expected, outputs):
    torch.testing.assert_close(outputs.logits, expected.logits)
    ours, theirs = gradients(model), gradients(twin)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def assert_equal_under_plans(adapted, twin, blocks, batch):
    runtime = get_runtime(adapted)
    for row in rows(len(blocks)):
        with reference_blocks(blocks, row):
            expected = step(twin, batch)
        with runtime.use(compile_plan(runtime.partitions["default"], row)):
            outputs = step(adapted, batch)
        assert_equal(adapted, twin, expected, outputs)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.quick(2)
def test_blocks_run_as_plain_code_has_it(name, lora):
    model, batch = double(name)
    adapted = whole(model, lora)
    twin, blocks = twin_of(model, adapted, lora)
    assert_equal_under_plans(adapted, twin, blocks, batch)


@pytest.mark.parametrize(
    ("name", "lora", "reentrant"),
    # Swin checkpoints whole stages, which reentrant checkpointing would run without gradients.
    [("mamba", False, True), ("deepseek_v3", False, False), ("deepseek_v3", True, True), ("swin", False, False)],
)
@pytest.mark.quick(2)
def test_checkpointed_blocks_recompute_under_their_plan(name, lora, reentrant):
    model, batch = double(name)
    adapted = whole(model, lora)
    twin, blocks = twin_of(model, adapted, lora)
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_equal_under_plans(adapted, twin, blocks, batch)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.quick(1)
def test_all_full_is_the_model_to_the_bit(name, lora):
    model, batch = WHOLE[name].build(), WHOLE[name].batch()
    adapted = whole(model, lora)
    twin, blocks = twin_of(model, adapted, lora)
    expected, runtime = step(twin, batch), get_runtime(adapted)
    with runtime.use(compile_plan(runtime.partitions["default"], [FULL] * len(blocks))):
        outputs = step(adapted, batch)
    assert outputs.logits.equal(expected.logits)
    ours = gradients(adapted)
    assert all(ours[key].equal(value) for key, value in gradients(twin).items())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.quick(1)
def test_a_block_that_is_constant_is_not_recomputed(reentrant):
    model, batch = double("deepseek_v3")
    adapted = whole(model, lora=True)
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    runtime, calls = get_runtime(adapted), []
    for block in runtime.blocks:
        block.self_attn.register_forward_hook(lambda module, *_: calls.append(module.layer_idx))
    for row, expected in (([FULL] * 3, [0, 0, 1, 1, 2, 2]), ([FULL, FORWARD_ONLY, FULL], [0, 0, 1, 2, 2])):
        calls.clear()
        with runtime.use(compile_plan(runtime.partitions["default"], row)):
            step(adapted, batch)
        assert sorted(calls) == expected
    adapted.unload()
    assert not any(isinstance(m.__dict__.get("_gradient_checkpointing_func"), PlannedCheckpoint)
                   for m in adapted.modules())  # fmt: skip
